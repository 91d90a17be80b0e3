"""Finished runs with a flipped bit in a file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from faults.outcomes import Row, tail
from faults.workplace import Workplace


def flipped_bits(place: Workplace, run: Path, each: int, chance: random.Random, step: int = 1) -> Row:
    """A bit flipped in every file of a run, `each` times, and looked at by `inspect`."""
    row = Row("a flipped bit, in each file of a run")
    # A model card is a text for its reader to edit: `sparsefit push` writes it anew, from the report.
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
            status, name = place.command("inspect", run), file.relative_to(run).as_posix()
            if place.told(status) and file.name in place.output:
                row.told += 1
            elif status == 0 and means_the_same(file, whole):
                row.gone_on += 1
            else:
                row.silent.append(f"{name}, bit {bit}: status {status}: {tail(place.output)}")
        file.write_bytes(whole)
    return row


def means_the_same(file: Path, whole: bytes) -> bool:
    """Whether the bit is one that nobody reads: a time of an archive's member, a space of JSON."""
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
