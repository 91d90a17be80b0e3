"""Runs whose disk is full."""

from __future__ import annotations

import errno

from torch import Tensor

from faults.outcomes import Row, resumed, tail, wrong_in
from faults.workplace import Workplace
from faults.write_hook import Writes

NEEDS_SPACE = ("open", "os.mkdir", "tempfile.mkstemp")


def fill_disk(event: str) -> None:
    """Nothing more fits on the disk."""
    if event in NEEDS_SPACE:
        raise OSError(errno.ENOSPC, "No space left on device")


def full_disks(place: Workplace, expected: dict[str, Tensor], writes: int, number: int | None) -> Row:
    """A disk that is full from one write on; and, for what libraries write by themselves, from a size of file on."""
    row = Row("disk full from a write on")
    step = 1 if number is None else max(1, writes // number)
    cases: list[dict[str, int]] = [{"at": at} for at in range(1, writes + 1, step)]
    cases += [{"file_size": size} for size in ((0, 300, 3_000, 30_000) if number is None else (3_000,))]
    for case in cases:
        run = place.folder / f"full-{'-'.join(f'{k}-{v}' for k, v in case.items())}"
        row.tried += 1
        hook = Writes(run, case["at"], fill_disk) if "at" in case else None
        status = place.command("fit", "--config", place.recipe(run), hook=hook, file_size=case.get("file_size"))
        if status == 0 and (wrong := wrong_in(run, expected)) is not None:
            row.silent.append(f"{case}: {wrong}")
            continue
        if status != 0 and not place.told(status):
            row.lost.append(f"{case}: no sentence, status {status}: {tail(place.output)}")
            continue
        row.told += status != 0
        resumed(place, run, expected, row, str(case))
    return row
