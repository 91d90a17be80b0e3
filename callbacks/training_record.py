"""What a training is repeated by: how random numbers stood, the learning rates of each step, and their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from sparsefit.callbacks.random_states import RandomStates, random_states, set_random_states
from sparsefit.pruning import MaskSet


class TrainingRecord:
    """The course of one training, from its first step on, over all processes that it took.

    Attributes:
        steps: Optimizer steps taken, once training has ended.
        masks: The masks of the pruned model, once training has ended.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.masks: MaskSet | None = None
        self._random: dict[str, RandomStates] = {}
        self._rates: list[list[float]] = []  # of each step, those of the optimizer's groups

    def note_random(self, moment: str) -> None:
        """Note how random numbers stand, if the moment was not noted before."""
        self._random.setdefault(moment, random_states())

    def set_random(self, moment: str) -> None:
        """Have random numbers go on as they stood at a moment, where it is known."""
        if moment in self._random:
            set_random_states(self._random[moment])

    def note_rates(self, step: int, optimizer: Optimizer) -> None:
        """Note the learning rates with which the step of this number, from 0 on, is taken."""
        if step <= len(self._rates):  # else the steps before were taken by a run that noted none
            self._rates[step:] = [[float(group["lr"]) for group in optimizer.param_groups]]

    def set_rates(self, step: int, optimizer: Optimizer) -> None:
        """Have an optimizer take a step with the rates of the step of this number; as they are where none are known."""
        if step >= len(self._rates):
            return
        for group, rate in zip(optimizer.param_groups, self._rates[step], strict=False):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    @property
    def whole(self) -> bool:
        """Whether the rates of all steps are known: not where a run was resumed that noted none."""
        return len(self._rates) >= self.steps

    def state_dict(self) -> dict[str, Any]:
        """As tensors and numbers, which load with `torch.load(weights_only=True)`."""
        return {
            "random": dict(self._random),
            "groups": [len(rates) for rates in self._rates],
            "rates": torch.tensor([rate for rates in self._rates for rate in rates], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        self._random = dict(state["random"])
        rates = iter(state["rates"].tolist())
        self._rates = [[next(rates) for _ in range(groups)] for groups in state["groups"]]
