"""Putting what was chosen into a model, for a while or for good: all of it or none, whatever comes between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.pruning.choice import Choice
from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.quantized import forget_cached, restore, snapshot, write_quantized, zero_outside
from sparsefit.pruning.weights import PrunableWeight, as_matrix, zero_outside_mask


class Changes:
    """What has been chosen for a model's weights so far: the masks, and new values where there are any.

    New values wait in CPU memory, in the dtype of their weight.

    Attributes:
        masks: The masks chosen.
    """

    def __init__(self) -> None:
        self.masks = MaskSet()
        self._values: dict[str, Tensor] = {}
        self._uncalled: set[str] = set()

    def add(self, weight: PrunableWeight, choice: Choice, called: bool = True) -> None:
        """Take in what was chosen for a weight, and whether its layers are called to use it."""
        self.masks.add(weight.name, choice.mask, weight.transposed)
        if not called:
            self._uncalled.add(weight.name)
        if choice.values is not None:
            dtype = torch.float32 if weight.is_quantized else weight.parameter.dtype
            self._values[weight.name] = choice.values.to("cpu", dtype)

    def __contains__(self, weight: PrunableWeight) -> bool:
        return weight.name in self.masks

    def make(self, weight: PrunableWeight) -> None:
        """Change a weight as it was chosen. Doing it twice is doing it once."""
        values = self._values.get(weight.name)
        if not weight.is_quantized:
            matrix = weight.matrix()
            if values is None:
                zero_outside_mask(matrix, self.masks.mask(weight.name, matrix.device))
            else:
                matrix.copy_(values)
            _forget_cached(weight)
        elif values is None:
            zero_outside(weight.layers[0], self.masks[weight.name])
        else:
            write_quantized(weight.layers[0], values)

    def make_all(self, weights: list[PrunableWeight]) -> None:
        """Change all weights for good."""
        _all_or_again(self.make, weights)

    @contextmanager
    def made(self, weights: Iterable[PrunableWeight], now: bool = False) -> Iterator[None]:
        """Weights changed for a while: as they were afterwards, to the bit, whatever happens.

        Args:
            weights: The weights; each has been chosen for.
            now: Change the tensors themselves, at the price of a copy of them. Else a weight that belongs to a layer
                that is called is changed on each call, in a copy that lives as long as the call.
        """
        undo: list[Callable[[], object]] = []
        try:
            for weight in weights:
                at_once = now or weight.fused or weight.is_quantized or weight.parameter.is_inference()
                if at_once or weight.name in self._uncalled:
                    undo.append(self._undo(weight))
                    self.make(weight)
                else:
                    undo += self._change_on_call(weight)
            yield
        finally:
            _all_or_again(lambda back: back(), undo)

    def _undo(self, weight: PrunableWeight) -> Callable[[], object]:
        if weight.is_quantized:
            before = snapshot(weight.layers[0])
            return lambda: restore(weight.layers[0], before)
        matrix = weight.matrix()
        before = matrix.clone()  # gathering the pruned weights alone would take a tenth of a pass through the block
        return lambda: (matrix.copy_(before), _forget_cached(weight))

    def _change_on_call(self, weight: PrunableWeight) -> list[Callable[[], object]]:
        parameter, dense = weight.parameter, weight.parameter.data

        def enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
            parameter.data = self._changed(weight, dense)

        def leave(*_: Any) -> None:
            parameter.data = dense
            _forget_cached(weight)

        handles = [layer.register_forward_pre_hook(enter) for layer in weight.layers]
        handles += [layer.register_forward_hook(leave, always_call=True) for layer in weight.layers]
        return [*(handle.remove for handle in handles), leave]

    def _changed(self, weight: PrunableWeight, dense: Tensor) -> Tensor:
        changed = dense.clone()
        matrix = as_matrix(changed, weight.transposed)
        if weight.name in self._values:
            matrix.copy_(self._values[weight.name])
        else:
            zero_outside_mask(matrix, self.masks.mask(weight.name, matrix.device))
        return changed


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
