"""Putting what was chosen into a model, for a while or for good: all of it or none, whatever comes between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsefit.pruning.choice import Choice
from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.quantized import forget_cached, restore, snapshot, write_quantized, zero_outside
from sparsefit.pruning.weights import PrunableWeight


class Changes:
    """What has been chosen for a model's weights so far: the masks, and new values where there are any.

    New values wait in CPU memory, in the dtype of their weight.

    Attributes:
        masks: The masks chosen.
    """

    def __init__(self) -> None:
        self.masks = MaskSet()
        self._values: dict[str, Tensor] = {}

    def add(self, weight: PrunableWeight, choice: Choice) -> None:
        """Take in what was chosen for a weight."""
        self.masks.add(weight.name, choice.mask, weight.transposed)
        if choice.values is not None:
            dtype = torch.float32 if weight.is_quantized else weight.parameter.dtype
            self._values[weight.name] = choice.values.to("cpu", dtype)

    def __contains__(self, weight: PrunableWeight) -> bool:
        return weight.name in self.masks

    def make(self, weight: PrunableWeight) -> None:
        """Change a weight as it was chosen. Doing it twice is doing it once."""
        mask, values = self.masks[weight.name], self._values.get(weight.name)
        if not weight.is_quantized:
            matrix = weight.matrix()
            if values is None:
                matrix.masked_fill_(~mask.to(matrix.device), 0)
            else:
                matrix.copy_(values)
            _forget_cached(weight)
        elif values is None:
            zero_outside(weight.layers[0], mask)
        else:
            write_quantized(weight.layers[0], values)

    def make_all(self, weights: list[PrunableWeight]) -> None:
        """Change all weights for good."""
        _all_or_again(self.make, weights)

    @contextmanager
    def made(self, weights: Iterable[PrunableWeight]) -> Iterator[None]:
        """Weights changed for a while: as they were afterwards, to the bit, whatever happens."""
        undo: list[Callable[[], object]] = []
        try:
            for weight in weights:
                undo.append(self._undo(weight))
                self.make(weight)
            yield
        finally:
            _all_or_again(lambda back: back(), undo)

    def _undo(self, weight: PrunableWeight) -> Callable[[], object]:
        if weight.is_quantized:
            before = snapshot(weight.layers[0])
            return lambda: restore(weight.layers[0], before)
        matrix = weight.matrix()
        if weight.name in self._values:
            whole = matrix.clone()
            put_back = partial(matrix.copy_, whole)
        else:
            pruned = ~self.masks[weight.name].to(matrix.device)
            put_back = partial(matrix.masked_scatter_, pruned, matrix.masked_select(pruned))
        return lambda: (put_back(), _forget_cached(weight))


def _forget_cached(weight: PrunableWeight) -> None:
    for layer in weight.layers:
        forget_cached(layer)


def _all_or_again(act: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Act on every item. An interrupt half-way is held back until all are acted on, from the first one anew."""
    try:
        for item in items:
            act(item)
    except BaseException:
        while not _done(act, items):
            pass
        raise


def _done(act: Callable[[Any], None], items: Iterable[Any]) -> bool:
    try:
        for item in items:
            act(item)
    except KeyboardInterrupt:  # an impatient one more
        return False
    return True
