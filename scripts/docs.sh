#!/usr/bin/env bash
# Builds the documentation into site/, without network: open site/index.html. Arguments go to mkdocs.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
.venv/bin/python scripts/build_docs.py "$@"
