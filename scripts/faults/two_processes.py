"""A second process tries to resume a run in progress."""

from __future__ import annotations

import os
import signal
import time

from torch import Tensor

from faults.forked_commands import ForkedCommands
from faults.outcomes import Row, tail, wrong_in


def two_processes(commands: ForkedCommands, expected: dict[str, Tensor]) -> Row:
    """Try to resume a run while its process is paused; then let this process finish."""
    row, run = Row("two processes on one run", tried=1), commands.folder / "two"
    first = commands.start("fit", "--config", commands.recipe(run))
    while not (run / "state.json").exists():
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    try:
        status = commands.run("fit", "--resume", run)
        refused = commands.reported(status) and "another run is running" in commands.output
    finally:
        os.kill(first, signal.SIGCONT)
    if not refused:
        row.silent.append(f"status {status}: {tail(commands.output)}")
    status = commands.wait(first)
    wrong = wrong_in(run, expected)
    if status or wrong:
        row.lost.append(f"the first process: status {status}: {wrong}")
    elif refused:
        row.reported, row.resumed = 1, 1
    return row
