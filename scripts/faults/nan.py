"""Set a loss, a gradient or a weight of a run to NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from faults.forked_commands import ForkedCommands
from faults.outcomes import Row, resume_run, tail
from sparsefit.modules import CausalLMModule


def not_finite(commands: ForkedCommands, expected: dict[str, Tensor], first: int = 0) -> Row:
    """Cause a NaN in a loss, a gradient or a weight, at each step from `first` on. Each run is then resumed without the
    fault."""
    row = Row("NaN in a loss, a gradient or a weight")
    for kind in ("loss", "gradient", "weight"):
        for step in range(first, commands.steps):
            run, what = commands.folder / f"nan-{kind}-{step}", f"{kind} of step {step}"
            row.tried += 1
            status = commands.run(
                "fit", "--config", commands.recipe(run), before=lambda k=kind, s=step: produce_nan(k, s)
            )
            if not commands.reported(status):
                row.silent.append(f"{what}: status {status}: {tail(commands.output)}")
                continue
            if broken := [file.name for file in written_models(run) if not_finite_in(file)]:
                row.silent.append(f"{what}: written to {broken}")
                continue
            row.reported += 1
            resume_run(commands, run, expected, row, what)
    return row


def produce_nan(kind: str, step: int) -> None:
    """Make the modules of this process produce a NaN at a step."""
    train = CausalLMModule.training_step

    def training_step(self: CausalLMModule, *args: Any) -> Tensor:
        return train(self, *args) * (math.nan if self.global_step == step else 1)

    def spoil_gradient(self: CausalLMModule) -> None:
        if self.global_step == step:
            next(p.grad for p in self.parameters() if p.grad is not None).view(-1)[0] = math.nan

    def spoil_weight(self: CausalLMModule, *_: Any) -> None:
        if self.global_step == step + 1:
            next(p for p in self.parameters() if p.requires_grad).data.view(-1)[0] = math.nan

    if kind == "loss":
        CausalLMModule.training_step = training_step
    elif kind == "gradient":
        CausalLMModule.on_after_backward = spoil_gradient
    else:
        CausalLMModule.on_train_batch_end = spoil_weight


def written_models(run: Path) -> list[Path]:
    """The files of a run that hold weights."""
    return [*run.rglob("*.safetensors"), *run.rglob("*.ckpt")]


def not_finite_in(file: Path) -> bool:
    """Whether a weight in a file is NaN or infinite."""
    tensors = torch.load(file, weights_only=True)["state_dict"] if file.suffix == ".ckpt" else load_file(file)
    return any(tensor.is_floating_point() and not bool(tensor.isfinite().all()) for tensor in tensors.values())
