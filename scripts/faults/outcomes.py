"""Outcome of a faulty run, compared with the reference run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from faults.forked_commands import ForkedCommands
from sparsefit.recovery.run_files import damaged_files, newest_checkpoint, read_state


@dataclass
class Row:
    """One row of the table: how many runs had the fault, how many of them were resumed or reported it, and descriptions
    of those that were lost or silently wrong."""

    fault: str
    tried: int = 0
    resumed: int = 0
    reported: int = 0
    lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


def outcome(run: Path) -> dict[str, Tensor]:
    """All tensors that a run trained, by file and name."""
    found = {}
    for part in ("base/model", "adapter/adapter_model", "model/model"):
        found |= {f"{part}.{name}": tensor for name, tensor in load_file(run / f"{part}.safetensors").items()}
    last = torch.load(newest_checkpoint(run), weights_only=True)
    found |= {f"checkpoint.{name}": value for name, value in last["state_dict"].items()}
    for number, state in last["optimizer_states"][0]["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return found


def wrong_in(run: Path, expected: dict[str, Tensor]) -> str | None:
    """How a run differs from the finished reference run, or what is damaged; None if nothing is wrong."""
    try:
        state = read_state(run)
        if state is None or state.name != "finished" or state.step == 0:
            return f"its state is {state}"
        if json.loads((run / "report.json").read_text())["status"] != "finished":
            return "its report is not finished"
        if damaged := damaged_files(run):
            return f"damaged: {damaged}"
        found = outcome(run)
        if found.keys() != expected.keys():
            return f"other tensors: {sorted(found.keys() ^ expected.keys())[:3]}"
        differing = [name for name in found if not torch.equal(found[name], expected[name])]
        return f"other values: {differing[:3]}" if differing else None
    except Exception as error:
        return repr(error)


def tail(text: str) -> str:
    """The last lines of an output."""
    return " | ".join(text.strip().splitlines()[-3:])[-400:]


def resume_run(commands: ForkedCommands, run: Path, expected: dict[str, Tensor], row: Row, what: str) -> None:
    """Resume a run and count its outcome in the row."""
    status = commands.resume(run)
    wrong = wrong_in(run, expected)
    if status == 0 and wrong is None:
        row.resumed += 1
        shutil.rmtree(run)
    elif status == 0:
        row.silent.append(f"{what}: {wrong}")
    else:
        row.lost.append(f"{what}: status {status}: {tail(commands.output)}")
