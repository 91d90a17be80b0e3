#!/usr/bin/env bash
# Runs the linter and the tests, a process on each core. Arguments go to pytest:
#   bash scripts/test.sh tests/pruning
#   bash scripts/test.sh -m "not slow"   # the quick ones
set -euo pipefail
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# The tests start many processes, each of which would compile the package again.
unset PYTHONDONTWRITEBYTECODE
# One thread each: more would wait for one another. A file stays in one process, as its tests share models and runs.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
