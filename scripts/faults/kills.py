"""Runs that are killed, at a write or at any time."""

from __future__ import annotations

import os
import random
import signal
import time

from torch import Tensor

from faults.outcomes import Row, resumed, tail
from faults.workplace import Workplace
from faults.write_hook import Writes


def kill(event: str) -> None:
    """As `kill -9` and a power cut do."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_writes(
    place: Workplace, expected: dict[str, Tensor], writes: int, number: int, chance: random.Random
) -> Row:
    """Killed at files' own moments: as one is opened, renamed or removed. Every third is killed again as it goes on."""
    row = Row("killed (SIGKILL) at a write in its folder")
    for case, at in enumerate(sorted(chance.sample(range(1, writes + 1), min(number, writes)))):
        run = place.folder / f"write-{at}"
        row.tried += 1
        status = place.command("fit", "--config", place.recipe(run), hook=Writes(run, at, kill))
        what = f"write {at}"
        if status != -signal.SIGKILL:
            row.lost.append(f"{what}: not killed ({status}): {tail(place.output)}")
            continue
        if case % 3 == 0 and (run / "config.yaml").exists():
            again = chance.randint(1, writes // 2)
            place.command("fit", "--resume", run, hook=Writes(run, again, kill))
            what += f", then {again}"
        resumed(place, run, expected, row, what)
    return row


def killed_at_times(
    place: Workplace, expected: dict[str, Tensor], seconds: float, number: int, chance: random.Random
) -> Row:
    """Killed at any time."""
    row = Row("killed (SIGKILL) at a random time")
    for case in range(number):
        run = place.folder / f"time-{case}"
        row.tried += 1
        child = place.start("fit", "--config", place.recipe(run))
        after = chance.uniform(0, seconds)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        place.ended(child)
        resumed(place, run, expected, row, f"after {after:.2f} s")
    return row
