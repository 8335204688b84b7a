#!/usr/bin/env bash
# What a container runs: `python -m` with the arguments, in the environment of env.sh.
# A run that SIGTERM stopped has saved and ends with 0. Kubernetes would take that for a finished one, so it ends with
# 143 here, as a process does that the signal ended.
set -euo pipefail
trap 'kill -TERM "${run:-}" 2>/dev/null || true; wait; exit 143' TERM INT
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

python -m "$@" &
run=$!
wait "$run"
