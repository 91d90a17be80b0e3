"""Modules, data and budgets with a simulated clock, for tests of the budget."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from small_runs import QUIET
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sparsefit.callbacks.budget import GPUHourBudget

BASE_RATE = 0.1


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat(torch.ones(2))


class Timed(LightningModule):
    """A model whose hooks each take a fixed time of a simulated clock."""

    def __init__(self, clock: Clock, step=1.0, validation=0.0, fit_start=0.0, slower_by_rank=0.0):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.clock, self.step, self.validation, self.fit_start = clock, step, validation, fit_start
        self.slower_by_rank = slower_by_rank
        self.rates: list[float] = []
        self.batches = 0

    def on_fit_start(self):
        self.clock.now += self.fit_start

    def training_step(self, batch, batch_idx):
        self.clock.now += self.step + self.slower_by_rank * self.global_rank
        self.batches += 1
        return self.layer(batch).sum()

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def validation_step(self, batch, batch_idx):
        self.clock.now += self.validation

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=BASE_RATE)


def budget_of_seconds(clock: Clock, seconds: float, **arguments) -> GPUHourBudget:
    budget = GPUHourBudget(gpu_hours=seconds / 3600, **arguments)
    budget.ledger.clock = clock
    return budget


def make_trainer(*callbacks: Callback, **arguments) -> Trainer:
    return Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": -1} | arguments))


def stream() -> DataLoader:
    return DataLoader(Endless(), batch_size=1)


def finite(count: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(count, 2)), batch_size=1, collate_fn=lambda rows: rows[0][0])


def seconds_spent(budget: GPUHourBudget) -> float:
    return budget.ledger.hours * 3600


def expected_rates(count: int, share_per_step: float, warmup_steps: int = 5) -> list[float]:
    """The expected rates by definition: a warm-up in fifths, then a line from 1 to 0."""
    return [
        BASE_RATE * (1 - step * share_per_step) * ((step + 1) / warmup_steps if step < warmup_steps else 1)
        for step in range(count)
    ]
