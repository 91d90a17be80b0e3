"""What to prune and how: the settings of one pruning, checked when they are made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from sparsefit.errors import ConfigError
from sparsefit.pruning.scores import SCORES
from sparsefit.pruning.selection import GRANULARITIES

UPDATES = ("block", "none")


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: `n` non-zeros in every `m` consecutive weights along the input dimension."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4", "4:8", ...

        Raises:
            ConfigError: for anything else, or where N is not below M.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f"pattern {text!r} is not of the form 'N:M', such as '2:4'; None is unstructured")
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise ConfigError(f"pattern '{text}' keeps {n} of every {m} weights; N must be at least 1 and below M")
        return cls(n, m)

    @property
    def sparsity(self) -> Fraction:
        """The share of zeros that the pattern means, exactly."""
        return Fraction(self.m - self.n, self.m)


@dataclass(frozen=True)
class PruningConfig:
    """The settings of `prune`.

    Args:
        sparsity: Share of the weights of every comparison group that become zero, in [0, 1). Taken as the
            decimal it is written as: 0.57 of 300 weights are 171. With a pattern, the pattern's own share.
        pattern: None (unstructured) or "N:M": N non-zeros of every M consecutive weights of a row.
        score: How important a weight is: "wanda" or "magnitude".
        granularity: Which weights compete: "output" (each row of a matrix) or "layer" (the whole matrix).
            None is what the score's authors use: per output for Wanda, per layer for magnitude. A pattern
            compares within its groups of M whatever the granularity.
        update: The order. "block": blocks are pruned one after the other and each one's statistics come from
            the outputs of the pruned blocks before it (the paper's order for language models). "none": all
            statistics come from the dense network (the paper's order for image classifiers).
        targets: Names of the layers to prune ("q_proj", "mlp.down_proj", or whole names). None: every linear
            layer inside the repeated blocks of the model.
        exclude: Names of layers that stay dense.
        micro_batch_size: Calibration samples that go through the model at once. Samples are regrouped to this
            size, so that the result does not depend on how the calibration data was batched.
    """

    sparsity: float = 0.5
    pattern: str | None = None
    score: str = "wanda"
    granularity: str | None = None
    update: str = "block"
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    micro_batch_size: int = 8

    def __post_init__(self) -> None:
        _check_choice("score", self.score, SCORES)
        _check_choice("update", self.update, UPDATES)
        if self.granularity is None:
            object.__setattr__(self, "granularity", SCORES[self.score].granularity)
        _check_choice("granularity", self.granularity, GRANULARITIES)
        object.__setattr__(self, "sparsity", self._checked_sparsity())
        for field in ("targets", "exclude"):
            object.__setattr__(self, field, _checked_names(field, getattr(self, field)))
        whole = isinstance(self.micro_batch_size, int) and not isinstance(self.micro_batch_size, bool)
        if not whole or self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size is {self.micro_batch_size!r}; it must be a whole number from 1 on")

    def _checked_sparsity(self) -> float:
        number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        if not number or not math.isfinite(self.sparsity) or not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"sparsity is {self.sparsity!r}; it must be a number in [0, 1), the share of weights to remove"
            )
        if self.pattern is None:
            return float(self.sparsity)
        implied = float(Pattern.parse(self.pattern).sparsity)
        # 0.5 is the default: it cannot be told from "not given".
        if self.sparsity not in (0.5, implied):
            raise ConfigError(
                f"sparsity {self.sparsity} contradicts pattern '{self.pattern}', which is {implied}: give one of them"
            )
        return implied

    @property
    def structure(self) -> Pattern | None:
        """The parsed pattern, or None for unstructured pruning."""
        return None if self.pattern is None else Pattern.parse(self.pattern)

    @property
    def exact_sparsity(self) -> Fraction:
        """The sparsity as the exact fraction that was asked for."""
        structure = self.structure
        return Fraction(str(self.sparsity)) if structure is None else structure.sparsity


def _check_choice(field: str, value: object, choices: Iterable[str]) -> None:
    names = tuple(choices)
    if value not in names:
        raise ConfigError(f"unknown {field} {value!r}; the choices are {', '.join(names)}")


def _checked_names(field: str, names: object) -> tuple[str, ...] | None:
    if names is None and field == "targets":
        return None
    if isinstance(names, str):
        return (names,)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{field} is {names!r}; it must be a list of layer names, such as ['q_proj', 'v_proj']")
    if field == "targets" and not names:
        raise ConfigError("targets is empty: nothing would be pruned; leave it out to prune every linear layer")
    return tuple(names)
