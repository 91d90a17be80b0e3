"""Flip a bit in a file of a finished run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from faults.forked_commands import ForkedCommands
from faults.outcomes import Row, tail


def flipped_bits(commands: ForkedCommands, run: Path, each: int, chance: random.Random, step: int = 1) -> Row:
    """Flip a bit in every file of a run, `each` times, and check the run with `sparsefit inspect`."""
    row = Row("a flipped bit, in each file of a run")
    # Users may edit a model card; `sparsefit push` writes a new one from the report.
    unread = {"logs", ".lock", "README.md"}
    files = sorted(file for file in run.rglob("*") if file.is_file() and not unread.intersection(file.parts))
    for file in files[::step]:
        whole = file.read_bytes()
        for _ in range(each):
            row.tried += 1
            bit = chance.randrange(8 * len(whole))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            status, name = commands.run("inspect", run), file.relative_to(run).as_posix()
            if commands.reported(status) and file.name in commands.output:
                row.reported += 1
            elif status == 0 and means_the_same(file, whole):
                row.resumed += 1
            else:
                row.silent.append(f"{name}, bit {bit}: status {status}: {tail(commands.output)}")
        file.write_bytes(whole)
    return row


def means_the_same(file: Path, whole: bytes) -> bool:
    """Whether the flipped bit has no meaning: one in the time stamp of an archive member, or in white space of JSON."""
    if file.suffix == ".json":
        try:
            return json.loads(file.read_text()) == json.loads(whole)
        except ValueError:
            return False
    if file.suffix != ".ckpt":
        return False
    (file.parent / "whole").write_bytes(whole)
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (file, file.parent / "whole"))
    (file.parent / "whole").unlink()
    return all(torch.equal(one[name], other[name]) for name in other)
