#!/usr/bin/env bash
# Runs the linter and the tests. Arguments go to pytest: bash scripts/test.sh tests/pruning
set -euo pipefail
source "$(dirname "$0")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "$@"
