#!/usr/bin/env bash
# All checks, as CI runs them: style, types, tests. Arguments go to pytest: bash launch/test.sh tests/nn -m "not slow"
set -euo pipefail
REQUIREMENTS="requirements.txt requirements-test.txt"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ruff check opensora_jax configs tests
ruff format --check opensora_jax configs tests
mypy
exec python -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
