"""Runs commands and scripts in processes forked from a server that has imported the libraries.

A new interpreter takes some 6 s to import them. The server is that of `ranks`.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ranks import forking


class Command:
    """A command in a new process.

    Args:
        arguments: `sparsefit` and its arguments, or `python` with a script and its arguments.
        folder: Its working directory.
        environment: Environment variables in addition to those of the tests.
    """

    def __init__(self, arguments: Sequence[object], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._output = Path(tempfile.mkdtemp())
        task = (self.arguments, str(folder), dict(environment or {}), str(self._output))
        self.process = forking().Process(target=_run, args=task)
        self.process.start()

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the command, which must come in time. Returns its status and output."""
        self.process.join(timeout)
        in_time = self.process.exitcode is not None
        if not in_time:
            self.process.kill()
            self.process.join()
        output, errors = ((self._output / name).read_text(encoding="utf-8") for name in ("1", "2"))
        shutil.rmtree(self._output)
        assert in_time, f"{self.arguments} did not end in {timeout} s; it printed: {output}\n{errors}"
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, output, errors)


def _run(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    for number in (1, 2):
        os.dup2(os.open(f"{output}/{number}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ |= environment
    sys.modules["matplotlib"] = None  # reports without figures, as in most tests
    program, *rest = arguments
    if program == "sparsefit":
        from sparsefit.cli import main

        sys.argv = [str(Path(sys.executable).with_name("sparsefit")), *rest]
        sys.exit(main())
    assert program == "python", program
    sys.argv = rest
    sys.path.insert(0, str(Path(rest[0]).parent))
    runpy.run_path(rest[0], run_name="__main__")
