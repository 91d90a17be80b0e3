"""Tests runs that are killed, whose disk is full, whose files are damaged, or whose folder is hostile.

    python scripts/fault_matrix.py --kills 50 --write docs/faults.md

Runs the command on a very small language model, once without a fault and then once for each fault, and resumes with
`sparsefit fit --resume RUN`. The columns of the table:

- resumed: the run then finishes with weights bit-identical to those of the run without a fault, and undamaged files;
- reported: the command ended with a message, not with a traceback or in silence;
- lost: the run could not be resumed;
- silent: the command accepted what is wrong.

The faults are in faults/, one module each.
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
from faults.forked_commands import ForkedCommands
from faults.hostile import hostile_folders
from faults.kills import kill, killed_at_times, killed_at_writes
from faults.nan import not_finite
from faults.outcomes import Row, outcome
from faults.two_processes import two_processes
from faults.write_hook import Writes

from sparsefit.callbacks import run_folder

KINDS = ("kills", "disk", "bits", "processes", "hostile", "nan")


def matrix(folder: Path, kills: int, disk: int | None, bits: int, seed: int, only: Container[str]) -> Iterator[Row]:
    """Yield the rows of the table."""
    chance, commands, run = random.Random(seed), ForkedCommands(folder), folder / "straight"
    run_folder._ORPHANS_END = 0.5  # seconds; the data loaders of these runs have no workers
    counted, start = Writes(run, sys.maxsize, kill), time.monotonic()
    status = commands.run("fit", "--config", commands.recipe(run), hook=counted)
    seconds, writes = time.monotonic() - start, int((folder / "count.txt").read_text())
    if status != 0:
        raise SystemExit(f"the run without a fault failed: {commands.output}")
    expected = outcome(run)
    if "kills" in only:
        yield killed_at_writes(commands, expected, writes, (kills + 1) // 2, chance)
        yield killed_at_times(commands, expected, seconds, kills // 2, chance)
    if "disk" in only:
        yield full_disks(commands, expected, writes, disk)
    if "bits" in only:
        yield flipped_bits(commands, run, bits, chance)
    if "processes" in only:
        yield two_processes(commands, expected)
    if "hostile" in only:
        yield hostile_folders(commands, run)
    if "nan" in only:
        yield not_finite(commands, expected)


def table(rows: list[Row]) -> str:
    """The table of the rows, in Markdown."""
    lines = ["| fault | tried | resumed | reported | lost | silent |", "|---|---|---|---|---|---|"]
    for row in rows:
        counts = (row.tried, row.resumed, row.reported, len(row.lost), len(row.silent))
        lines.append(f"| {row.fault} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def main() -> int:
    """Test all faults. Returns 1 if a run was lost or silently wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="number of runs that are killed")
    parser.add_argument("--disk", type=int, help="number of writes at which the disk is filled; by default all")
    parser.add_argument("--bits", type=int, default=3, help="number of bits flipped in each file")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="faults to test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file whose table is replaced")
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
