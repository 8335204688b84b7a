#!/usr/bin/env bash
# All checks, as CI runs them: style, types, tests. Arguments go to pytest: bash launch/test.sh tests/nn -m "not slow"
#   GOLDENS=<folder>   numbers of the original to compare with, in place of tests/goldens
set -euo pipefail
GOLDENS=$(cd "${GOLDENS:-$(dirname "${BASH_SOURCE[0]}")/../tests/goldens}" && pwd)  # env.sh changes the folder
REQUIREMENTS="requirements.txt requirements-test.txt"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ruff check opensora_jax configs tests benchmarks
ruff format --check opensora_jax configs tests benchmarks
mypy
exec python -m pytest -n logical --maxprocesses 8 --dist worksteal --goldens="$GOLDENS" "$@"
