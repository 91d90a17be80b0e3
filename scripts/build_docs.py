"""Builds the documentation into site/: `python scripts/build_docs.py`; arguments go to mkdocs (`--site-dir FOLDER`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / "build/docs"


def main() -> int:
    """Link the files that mkdocs.yml reads, and run mkdocs. Returns its exit status."""
    # The pages are in several folders, and callbacks/ is outside its package: links collect them for the site.
    shutil.rmtree(LINKS, ignore_errors=True)
    package = [file for file in (ROOT / "src/sparsefit").iterdir() if file.name != "callbacks"]
    for folder, parts in {
        "pages": [ROOT / name for name in ("README.md", "docs", "configs", "examples")],
        "packages/sparsefit": [*package, ROOT / "callbacks"],
    }.items():
        (LINKS / folder).mkdir(parents=True)
        for part in parts:
            (LINKS / folder / part.name).symlink_to(part)
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=quiet, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
