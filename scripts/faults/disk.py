"""Run on a full disk."""

from __future__ import annotations

import errno

from torch import Tensor

from faults.forked_commands import ForkedCommands
from faults.outcomes import Row, resume_run, tail, wrong_in
from faults.write_hook import Writes

NEEDS_SPACE = ("open", "os.mkdir", "tempfile.mkstemp")


def fill_disk(event: str) -> None:
    """Simulate a full disk."""
    if event in NEEDS_SPACE:
        raise OSError(errno.ENOSPC, "No space left on device")


def full_disks(commands: ForkedCommands, expected: dict[str, Tensor], writes: int, number: int | None) -> Row:
    """Fill the disk from a certain write on. As libraries also write by themselves, limit the size of files, too."""
    row = Row("disk full from a write on")
    step = 1 if number is None else max(1, writes // number)
    cases: list[dict[str, int]] = [{"at": at} for at in range(1, writes + 1, step)]
    cases += [{"file_size": size} for size in ((0, 300, 3_000, 30_000) if number is None else (3_000,))]
    for case in cases:
        run = commands.folder / f"full-{'-'.join(f'{k}-{v}' for k, v in case.items())}"
        row.tried += 1
        hook = Writes(run, case["at"], fill_disk) if "at" in case else None
        status = commands.run("fit", "--config", commands.recipe(run), hook=hook, file_size=case.get("file_size"))
        if status == 0 and (wrong := wrong_in(run, expected)) is not None:
            row.silent.append(f"{case}: {wrong}")
            continue
        if status != 0 and not commands.reported(status):
            row.lost.append(f"{case}: no message, status {status}: {tail(commands.output)}")
            continue
        row.reported += status != 0
        resume_run(commands, run, expected, row, str(case))
    return row
