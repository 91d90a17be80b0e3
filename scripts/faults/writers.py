"""Two processes at work on one run."""

from __future__ import annotations

import os
import signal
import time

from torch import Tensor

from faults.outcomes import Row, tail, wrong_in
from faults.workplace import Workplace


def two_writers(place: Workplace, expected: dict[str, Tensor]) -> Row:
    """A second process that goes on with a run which another one is at work on."""
    row, run = Row("two processes on one run", tried=1), place.folder / "two"
    first = place.start("fit", "--config", place.recipe(run))
    while not (run / "state.json").exists():
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    try:
        status = place.command("fit", "--resume", run)
        told = place.told(status) and "another run is running" in place.output
    finally:
        os.kill(first, signal.SIGCONT)
    if not told:
        row.silent.append(f"status {status}: {tail(place.output)}")
    status = place.ended(first)
    wrong = wrong_in(run, expected)
    if status or wrong:
        row.lost.append(f"the first one: status {status}: {wrong}")
    elif told:
        row.told, row.gone_on = 1, 1
    return row
