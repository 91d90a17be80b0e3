"""Seeing the inputs of a model's prunable weights while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsefit.pruning.blocks import version_of
from sparsefit.pruning.fused import FusedInputs
from sparsefit.pruning.weights import PrunableWeight


class Seen(NamedTuple):
    """The input of a weight in one call.

    Attributes:
        weight: Which weight.
        rows: Which of its rows see this input; None is all. The rows for query, key and value of attention differ.
        inputs: (..., in), or (..., in, height, width) before a convolution.
        version: Grows when the input is changed in place.
        layer: The layer that was called; None inside a fused function.
        positions: Which rows and columns of an image a 1x1 convolution looks at.
    """

    weight: PrunableWeight
    rows: slice | None
    inputs: Tensor
    version: int
    layer: nn.Module | None = None
    positions: tuple[slice, slice] = (slice(None), slice(None))

    @property
    def tokens(self) -> Tensor:
        """(tokens, in): what the matrix is multiplied by."""
        inputs = self.inputs.detach()
        if isinstance(self.weight.layers[0], nn.Conv2d):
            inputs = inputs[..., self.positions[0], self.positions[1]].movedim(-3, -1)
        return inputs.reshape(-1, inputs.shape[-1])

    def same_input(self, other: Seen | None) -> bool:
        """Whether another weight has seen the very same input."""
        if other is None or self.inputs is not other.inputs:
            return False
        return self.version == other.version and self.positions == other.positions


Record = Callable[[Seen], None]


@contextmanager
def hooked(weights: Iterable[PrunableWeight], record: Record) -> Iterator[None]:
    """Call `record` with the input of each layer before it is computed; hooks are gone afterwards, whatever happens."""

    def hook(weight: PrunableWeight) -> Callable[..., None]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            seen = Seen(weight, None, inputs, version_of(inputs), layer)
            record(seen._replace(positions=_positions(layer)) if isinstance(layer, nn.Conv2d) else seen)

        return before

    handles = [
        layer.register_forward_pre_hook(hook(weight), with_kwargs=True)
        for weight in weights
        for layer in weight.layers
        if not weight.fused
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _positions(layer: nn.Conv2d) -> tuple[slice, slice]:
    # It steps over the padded image; what it multiplies in the padding is zero and counts for nothing.
    padding = (0, 0) if isinstance(layer.padding, str) else layer.padding
    rows, columns = (slice(-p % step, None, step) for p, step in zip(padding, layer.stride, strict=True))
    return rows, columns


def fused_inputs(weights: Iterable[PrunableWeight], record: Record) -> AbstractContextManager[Any]:
    """Call `record` with the input of each weight that a fused function uses, in this thread, before it does."""
    watched = {(id(weight.parameter), weight.index): weight for weight in weights if weight.fused}
    if not watched:
        return nullcontext()

    def pass_on(parameter: nn.Parameter, index: int | None, rows: slice | None, inputs: Tensor) -> None:
        if weight := watched.get((id(parameter), index)):
            record(Seen(weight, rows, inputs, version_of(inputs)))

    return FusedInputs({id(w.parameter): w.parameter for w in watched.values()}.values(), pass_on)
