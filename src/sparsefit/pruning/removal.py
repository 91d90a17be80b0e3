"""Taking pruned weights out of a model, for a while or for good: all of them or none, whatever comes between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.weights import PrunableWeight


def remove_for_good(weights: list[PrunableWeight], masks: MaskSet) -> None:
    """Apply all masks for good."""
    _all_or_again(lambda weight: weight.remove(masks[weight.name]), weights)


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


@contextmanager
def removed_for_a_while(weights: list[PrunableWeight], masks: MaskSet) -> Iterator[None]:
    """Weights pruned for a while: dense again afterwards, whatever happens."""
    taken: list[tuple[PrunableWeight, Tensor, Tensor]] = []
    try:
        for weight in weights:
            mask = masks[weight.name].to(weight.parameter.device)
            taken.append((weight, mask, weight.matrix()[~mask]))
            weight.remove(mask)
        yield
    finally:
        _all_or_again(lambda item: item[0].restore(*item[1:]), taken)
