"""Input groups: weights that see the same inputs share one statistic, one Gram matrix, one factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.statistics import InputStatistics


class Part(NamedTuple):
    """Rows of a weight and the statistics of what they see."""

    rows: slice
    statistics: InputStatistics


Parts = dict[str, list[Part]]  # by weight, in the order of its rows


@dataclass
class InputGroup:
    """Weights that see the same inputs: q, k and v of an attention, gate and up of a gated feed-forward.

    Most groups have one statistic. Rows of a weight can see other inputs than the rest of it (query and key of
    cross-attention packed in one matrix; the groups of a convolution); then there are several.

    Attributes:
        weights: In the order of the model.
        parts: For each weight its rows and their statistics.
    """

    weights: list[PrunableWeight]
    parts: Parts

    @property
    def seen(self) -> bool:
        """Whether any token reached its weights."""
        return any(part.statistics.tokens for weight in self.weights for part in self.parts[weight.name])

    def by_statistics(self) -> list[tuple[InputStatistics, list[tuple[PrunableWeight, slice]]]]:
        """Each statistic with the rows that it is of."""
        found: dict[int, tuple[InputStatistics, list[tuple[PrunableWeight, slice]]]] = {}
        for weight in self.weights:
            for part in self.parts[weight.name]:
                found.setdefault(id(part.statistics), (part.statistics, []))[1].append((weight, part.rows))
        return list(found.values())

    def with_columns(self, order: Tensor) -> InputGroup:
        """The same group with the inputs in another order."""
        moved = {id(statistics): statistics.columns(order) for statistics, _ in self.by_statistics()}
        parts = {name: [Part(rows, moved[id(own)]) for rows, own in found] for name, found in self.parts.items()}
        return InputGroup(self.weights, parts)


def input_groups(weights: Sequence[PrunableWeight], parts: Mapping[str, list[Part]]) -> list[InputGroup]:
    """Weights put together where they share a statistic.

    Args:
        weights: In the order of the model.
        parts: Their statistics; a weight without any is a group of its own.

    >>> import torch
    >>> from torch import nn
    >>> query, key = (PrunableWeight(name, nn.Parameter(torch.ones(2, 3)), ()) for name in ("query", "key"))
    >>> shared = Part(slice(0, 2), InputStatistics(3, torch.device("cpu")))
    >>> [group.weights == [query, key] for group in input_groups([query, key], {"query": [shared], "key": [shared]})]
    [True]
    """
    groups: list[InputGroup] = []
    for weight in weights:
        own = parts.get(weight.name, [])
        statistics = {id(part.statistics) for part in own}
        for group in groups:
            if statistics & {id(part.statistics) for found in group.parts.values() for part in found}:
                group.weights.append(weight)
                group.parts[weight.name] = own
                break
        else:
            groups.append(InputGroup([weight], {weight.name: own}))
    return groups
