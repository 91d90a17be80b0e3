"""Input groups: weights that see the same inputs share one statistic, one Gram matrix, one factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.statistics import InputStatistics


class Part(NamedTuple):
    """Some rows of a weight, and the statistics of their inputs."""

    rows: slice
    statistics: InputStatistics


Parts = dict[str, list[Part]]  # by the name of the weight, in the order of its rows
Rows = list[tuple[str, slice]]  # the name of a weight and some of its rows, for several weights


@dataclass
class InputGroup:
    """Weights, in the order of the model, that have the same inputs, such as q, k and v of an attention.

    A group has several statistics if rows of one weight have different inputs: query and key of cross-attention packed
    in one matrix, or the groups of a convolution.
    """

    weights: list[PrunableWeight]
    parts: Parts

    @cached_property
    def has_nonzero_inputs(self) -> bool:
        """Whether any input that reached its weights was not zero."""
        return any(bool(statistics["squared_norm"].any()) for statistics in self.by_statistics())

    def by_statistics(self) -> dict[InputStatistics, Rows]:
        """Each statistic, with the rows that have these inputs."""
        found: dict[InputStatistics, Rows] = {}
        for name, parts in self.parts.items():
            for part in parts:
                found.setdefault(part.statistics, []).append((name, part.rows))
        return found

    def with_columns(self, order: Tensor) -> InputGroup:
        """A copy of the group with its inputs (the columns) reordered."""
        moved = {statistics: statistics.columns(order) for statistics in self.by_statistics()}
        parts = {name: [Part(rows, moved[own]) for rows, own in found] for name, found in self.parts.items()}
        return InputGroup(self.weights, parts)


def input_groups(weights: Sequence[PrunableWeight], parts: Mapping[str, list[Part]]) -> list[InputGroup]:
    """Group weights, in the order of the model, that share a statistic; one without statistics is a group of its own.

    >>> query, key = (PrunableWeight(name, Tensor(2, 3), ()) for name in ("query", "key"))
    >>> shared = Part(slice(0, 2), InputStatistics(3, Tensor().device))
    >>> [group.weights == [query, key] for group in input_groups([query, key], {"query": [shared], "key": [shared]})]
    [True]
    """
    groups: list[InputGroup] = []
    of_statistics: dict[InputStatistics, InputGroup] = {}
    for weight in weights:
        own = parts.get(weight.name, [])
        group = next((of_statistics[part.statistics] for part in own if part.statistics in of_statistics), None)
        if group is None:
            group = InputGroup([], {})
            groups.append(group)
        group.weights.append(weight)
        group.parts[weight.name] = own
        for part in own:
            of_statistics.setdefault(part.statistics, group)
    return groups
