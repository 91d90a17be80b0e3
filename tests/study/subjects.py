"""A small classifier, its data, and what a study asks of both."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsefit.pruning import MaskSet
from sparsefit.study import Subject


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.BatchNorm1d(16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(self.down(torch.relu(self.up(hidden))))


class Classifier(nn.Module):
    """Counts how often it is run and evaluated."""

    metrics = {"accuracy": "higher", "margin": "higher"}  # noqa: RUF012 - as a LightningModule has it

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.runs, self.evaluations = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.runs += 1
        return self(batch[0])

    @torch.no_grad()
    def evaluate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
        self.evaluations += 1
        mode = self.training
        [(x, y)] = batches
        logits = self.eval()(x)
        self.train(mode)
        return {"accuracy": float((logits.argmax(1) == y).float().mean()), "margin": float(logits.std())}


class Data:
    """Labels are what the dense model says; counts how often it is calibrated on."""

    def __init__(self, model: Classifier) -> None:
        self.calibrations = 0
        self.x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        self.y = model.eval()(self.x).argmax(1)

    def calibration_dataloader(self, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        self.calibrations += 1
        return [(x, x[:, 0]) for x in torch.roll(self.x[: 64 - 8 * seed], seed, 0).split(16)]

    def test_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.x, self.y)]


def finetune(module: nn.Module, masks: MaskSet, seed: int = 0) -> None:
    """Changes what is kept, and a buffer, and leaves modes and gradients behind."""
    module.train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 + seed)
        masks.apply(module)
        module.blocks[0].norm.running_mean.add_(1)
        module.seen.add_(1)
    module.head.weight.grad = torch.ones_like(module.head.weight)
    module.head.requires_grad_(False)


def subject(**settings) -> tuple[Subject, Data]:
    model = Classifier()
    data = Data(model)
    return Subject("net", model, lambda batch: model.predict_step(batch, 0), **settings), data
