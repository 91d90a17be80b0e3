"""Tests a run that is killed, whose disk is full, whose files are damaged, or whose folder is hostile.

    python scripts/fault_matrix.py --kills 50 --write docs/faults.md

Runs the command on a very small language model, once without a fault and then once for each fault, and resumes with
`sparsefit fit --resume RUN`. The columns of the table:

- resumed: the run then finishes with weights bit-identical to those of the run without a fault, and undamaged files;
- reported: the command ended with a message, not with a traceback or in silence;
- lost: the run could not be resumed;
- silent: the command accepted what is wrong.

The faults are in faults/, a module for each kind.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Container, Iterator
from pathlib import Path

from faults.bits import flipped_bits
from faults.disk import full_disks
from faults.hostile import hostile_folders
from faults.kills import kill, killed_at_times, killed_at_writes
from faults.nan import not_finite
from faults.outcomes import Row, outcome
from faults.workplace import Workplace
from faults.write_hook import Writes
from faults.writers import two_writers

from sparsefit.callbacks import run_folder

KINDS = ("kills", "disk", "bits", "writers", "hostile", "nan")


def matrix(folder: Path, kills: int, disk: int | None, bits: int, seed: int, only: Container[str]) -> Iterator[Row]:
    """The rows of the table, one after the other."""
    chance, place, run = random.Random(seed), Workplace(folder), folder / "straight"
    run_folder._ORPHANS_END = 0.5  # no loader of these runs has workers
    counted, start = Writes(run, sys.maxsize, kill), time.monotonic()
    status = place.command("fit", "--config", place.recipe(run), hook=counted)
    seconds, writes = time.monotonic() - start, int((folder / "count.txt").read_text())
    if status != 0:
        raise SystemExit(f"the undisturbed run failed: {place.output}")
    expected = outcome(run)
    if "kills" in only:
        yield killed_at_writes(place, expected, writes, (kills + 1) // 2, chance)
        yield killed_at_times(place, expected, seconds, kills // 2, chance)
    if "disk" in only:
        yield full_disks(place, expected, writes, disk)
    if "bits" in only:
        yield flipped_bits(place, run, bits, chance)
    if "writers" in only:
        yield two_writers(place, expected)
    if "hostile" in only:
        yield hostile_folders(place, run)
    if "nan" in only:
        yield not_finite(place, expected)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| fault | tried | resumed | reported | lost | silent |", "|---|---|---|---|---|---|"]
    for row in rows:
        counts = (row.tried, row.gone_on, row.told, len(row.lost), len(row.silent))
        lines.append(f"| {row.fault} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def main() -> int:
    """Run the matrix; 1 if anything was lost or silent."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="moments to be killed at")
    parser.add_argument("--disk", type=int, help="writes to fill the disk at; by default every one")
    parser.add_argument("--bits", type=int, default=3, help="bits flipped in each file")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="some rows of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file, whose table is replaced")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in matrix(Path(folder).resolve(), given.kills, given.disk, given.bits, given.seed, given.only):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            for what, cases in (("lost", row.lost), ("silent", row.silent)):
                for case in cases:
                    print(f"  {what}: {case}", flush=True)
    print(f"\n{table(rows)}")
    if given.write is not None:
        before, _, rest = given.write.read_text(encoding="utf-8").partition("| fault |")
        after = "\n".join(line for line in rest.splitlines()[1:] if not line.startswith("|"))
        given.write.write_text(f"{before}{table(rows)}\n{after.lstrip()}", encoding="utf-8")
    return int(any(row.lost or row.silent for row in rows))


if __name__ == "__main__":
    sys.exit(main())
