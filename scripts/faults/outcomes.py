"""What became of a run: a line of the table, and whether a run ended as the one without a fault."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from faults.workplace import Workplace
from sparsefit.recovery.run_files import damaged_files, newest_checkpoint, read_state


@dataclass
class Row:
    """One line of the table."""

    fault: str
    tried: int = 0
    gone_on: int = 0
    told: int = 0
    lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


def outcome(run: Path) -> dict[str, Tensor]:
    """All that a run has trained, by file and name."""
    found = {}
    for part in ("base/model", "adapter/adapter_model", "model/model"):
        found |= {f"{part}.{name}": tensor for name, tensor in load_file(run / f"{part}.safetensors").items()}
    last = torch.load(newest_checkpoint(run), weights_only=True)
    found |= {f"checkpoint.{name}": value for name, value in last["state_dict"].items()}
    for number, state in last["optimizer_states"][0]["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return found


def wrong_in(run: Path, expected: dict[str, Tensor]) -> str | None:
    """What is wrong with a run that should be finished as the undisturbed one is; None if nothing is."""
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
    """The end of an output, for the account of what is lost."""
    return " | ".join(text.strip().splitlines()[-3:])[-400:]


def resumed(place: Workplace, run: Path, expected: dict[str, Tensor], row: Row, what: str) -> None:
    """Go on with a run, and note what became of it."""
    status = place.go_on(run)
    wrong = wrong_in(run, expected)
    if status == 0 and wrong is None:
        row.gone_on += 1
        shutil.rmtree(run)
    elif status == 0:
        row.silent.append(f"{what}: {wrong}")
    else:
        row.lost.append(f"{what}: status {status}: {tail(place.output)}")
