# Sourced by the other scripts: creates .venv with the tested versions, and updates it when they change.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "sparsefit needs Python 3.10 or newer; set PYTHON to one" >&2; exit 1; }

[ -x .venv/bin/python ] || "$python" -m venv .venv
wanted="$(cat pyproject.toml constraints.txt | cksum) $(pwd)"
if [ "$wanted" != "$(cat .venv/installed 2>/dev/null)" ]; then
  echo "Installing into .venv ..."
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  # torch first, alone: other packages would install a build with CUDA where a CPU build is enough.
  .venv/bin/python -m pip install --quiet "$(grep '^torch==' constraints.txt)"
  .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
  echo "$wanted" >.venv/installed
fi
