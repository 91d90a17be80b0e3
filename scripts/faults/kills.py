"""Kill a run at one of its writes, or at a random time."""

from __future__ import annotations

import os
import random
import signal
import time

from torch import Tensor

from faults.forked_commands import ForkedCommands
from faults.outcomes import Row, resume_run, tail
from faults.write_hook import Writes


def kill(event: str) -> None:
    """Kill the process without cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_writes(
    commands: ForkedCommands, expected: dict[str, Tensor], writes: int, number: int, chance: random.Random
) -> Row:
    """Kill runs as they open, rename or remove a file. Every third run is killed a second time after it is resumed."""
    row = Row("killed (SIGKILL) at a write in its folder")
    for case, at in enumerate(sorted(chance.sample(range(1, writes + 1), min(number, writes)))):
        run = commands.folder / f"write-{at}"
        row.tried += 1
        status = commands.run("fit", "--config", commands.recipe(run), hook=Writes(run, at, kill))
        what = f"write {at}"
        if status != -signal.SIGKILL:
            row.lost.append(f"{what}: not killed ({status}): {tail(commands.output)}")
            continue
        if case % 3 == 0 and (run / "config.yaml").exists():
            again = chance.randint(1, writes // 2)
            commands.run("fit", "--resume", run, hook=Writes(run, again, kill))
            what += f", then {again}"
        resume_run(commands, run, expected, row, what)
    return row


def killed_at_times(
    commands: ForkedCommands, expected: dict[str, Tensor], seconds: float, number: int, chance: random.Random
) -> Row:
    """Kill runs at random times."""
    row = Row("killed (SIGKILL) at a random time")
    for case in range(number):
        run = commands.folder / f"time-{case}"
        row.tried += 1
        child = commands.start("fit", "--config", commands.recipe(run))
        after = chance.uniform(0, seconds)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        commands.wait(child)
        resume_run(commands, run, expected, row, f"after {after:.2f} s")
    return row
