#!/usr/bin/env bash
# Runs the linter and the tests, one process per core. Arguments go to pytest:
#   bash scripts/test.sh tests/pruning
#   bash scripts/test.sh -m "not slow"   # the quick ones
set -euo pipefail
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# The tests start many processes, each of which would compile the package again.
unset PYTHONDONTWRITEBYTECODE
# One thread each, as more would compete for the cores. The tests of a file share models and runs, so run in one process.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
