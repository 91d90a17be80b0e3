"""What is recorded of a training so that it can be repeated: random states, learning rates and number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from sparsefit.callbacks.random_states import RandomStates, random_states, set_random_states
from sparsefit.pruning import MaskSet


class TrainingRecord:
    """The random states and learning rates of one training from its first step on, across resumes.

    Attributes:
        steps: Optimizer steps taken, once training has ended.
        masks: The masks of the pruned model, once training has ended.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.masks: MaskSet | None = None
        self._random: dict[str, RandomStates] = {}
        self._rates: list[list[float]] = []  # for each step, the rate of each parameter group

    def note_random(self, moment: str) -> None:
        """Record the random states under the name `moment`, unless that name is recorded already."""
        self._random.setdefault(moment, random_states())

    def set_random(self, moment: str) -> None:
        """Restore the random states recorded under the name `moment`, if there are any."""
        if moment in self._random:
            set_random_states(self._random[moment])

    def note_rates(self, step: int, optimizer: Optimizer) -> None:
        """Record the learning rates of optimizer step number `step`, counted from 0."""
        if step <= len(self._rates):  # otherwise the steps before were taken by a run that recorded no rates
            self._rates[step:] = [[float(group["lr"]) for group in optimizer.param_groups]]

    def set_rates(self, step: int, optimizer: Optimizer) -> None:
        """Set an optimizer's learning rates to those recorded for step number `step`; unknown steps change nothing."""
        if step >= len(self._rates):
            return
        for group, rate in zip(optimizer.param_groups, self._rates[step], strict=False):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    @property
    def whole(self) -> bool:
        """Whether the rates of all steps are known: False if the run was resumed from one that recorded none."""
        return len(self._rates) >= self.steps

    def state_dict(self) -> dict[str, Any]:
        """The record as tensors and plain values, which load with `torch.load(weights_only=True)`."""
        return {
            "random": dict(self._random),
            "groups": [len(rates) for rates in self._rates],
            "rates": torch.tensor([rate for rates in self._rates for rate in rates], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._random = dict(state["random"])
        rates = iter(state["rates"].tolist())
        self._rates = [[next(rates) for _ in range(groups)] for groups in state["groups"]]
