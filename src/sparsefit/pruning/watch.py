"""Seeing what a model's weights are multiplied by while it runs: at the product itself, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefit.pruning.layers import PRODUCTS
from sparsefit.pruning.layers.base import PrunableWeight

Rows = tuple[int, int] | None


class Seen(NamedTuple):
    """What a weight is multiplied by in one product.

    Attributes:
        weight: Which weight.
        rows: Which of its rows, (start, stop); None is all. Those for query, key and value of attention can differ.
        inputs: The tensor as the product was given it.
        version: Grows when that tensor is changed in place.
        tokens: Gives the rows that the matrix multiplies, (tokens, in), in one or several pieces.
        key: Tells apart what is taken from one tensor in different ways.
        real: Which of the tokens are no padding, (tokens,) bool; None if all are; or why that cannot be told.
    """

    weight: PrunableWeight
    rows: Rows
    inputs: Tensor
    version: int
    tokens: Callable[[], Iterator[Tensor]]
    key: Hashable
    real: Tensor | str | None = None

    def same_input(self, other: Seen | None) -> bool:
        """Whether another weight is multiplied by the very same."""
        if other is None or self.inputs is not other.inputs:
            return False
        return self.version == other.version and self.key == other.key


class Watch(TorchFunctionMode):
    """While active, hands what each watched weight is multiplied by to `record`, just before the product.

    Args:
        weights: The weights to watch.
        record: Takes in a `Seen`.
    """

    def __init__(self, weights: Iterable[PrunableWeight], record: Callable[[Seen], None]) -> None:
        super().__init__()
        self._record = record
        self._by_storage: dict[int, list[PrunableWeight]] = {}
        for weight in weights:
            if _storage(weight.parameter):
                self._by_storage.setdefault(_storage(weight.parameter), []).append(weight)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        handler = PRODUCTS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, args, kwargs or {}, self)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a watched parameter or a view of one."""
        return _storage(tensor) in self._by_storage

    def __call__(
        self,
        weight: Tensor,
        inputs: Tensor,
        out_rows: slice | None = None,
        tokens: Callable[[], Iterator[Tensor]] | None = None,
        key: Hashable = None,
    ) -> None:
        """Take in what a weight is about to be multiplied by: see `layers.base.See`."""
        for watched in self._by_storage.get(_storage(weight), ()):
            found, rows = _rows_in(weight, watched.view)
            if found and inputs.numel():
                rows = rows if out_rows is None else (out_rows.start, out_rows.stop)
                self._record(
                    Seen(watched, rows, inputs, version_of(inputs), tokens or (lambda: iter([_flat(inputs)])), key)
                )


@contextmanager
def watching(weights: Iterable[PrunableWeight], record: Callable[[Seen], None]) -> Iterator[None]:
    """Hand what each weight is multiplied by to `record` while this lasts.

    A layer that is called and whose product is not seen, as bitsandbytes computes it in kernels of its own, counts
    with what it was called with. All hooks are gone afterwards, whatever happens.

    >>> layer, seen = nn.Linear(2, 3), []
    >>> with watching([PrunableWeight("weight", layer.weight, (layer,))], seen.append):
    ...     _ = layer(torch.ones(5, 2))
    >>> [(what.weight.name, what.inputs.shape) for what in seen]
    [('weight', torch.Size([5, 2]))]
    """
    weights = list(weights)
    called: dict[int, Tensor] = {}  # by layer, the input of the call under way, until its product is seen

    def seen(what: Seen) -> None:
        for layer in what.weight.layers:
            called.pop(id(layer), None)
        record(what)

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called[id(layer)] = args[0] if args else next(iter(kwargs.values()))

    def leave(weight: PrunableWeight) -> Callable[..., None]:
        def after(layer: nn.Module, *_: Any) -> None:
            inputs = called.pop(id(layer), None)
            if inputs is not None and inputs.numel():
                record(Seen(weight, None, inputs, version_of(inputs), lambda: iter([_flat(inputs)]), None))

        return after

    handles = []
    try:
        for weight in (weight for weight in weights if weight.called):
            for layer in weight.layers:
                handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(layer.register_forward_hook(leave(weight)))
        with Watch(weights, seen):
            yield
    finally:
        for handle in handles:
            handle.remove()


def version_of(tensor: Tensor) -> int:
    """A number that grows when a tensor is changed in place (0 for inference tensors, which keep none).

    >>> version_of(torch.ones(2).add_(1).add_(1))
    2
    """
    return 0 if tensor.is_inference() else tensor._version


def _flat(inputs: Tensor) -> Tensor:
    """(..., in) as (tokens, in)."""
    return inputs.detach().reshape(-1, inputs.shape[-1])


def _storage(tensor: object) -> int:
    """What a view shares with its parameter; 0 for what is no plain tensor (quantized, sparse, distributed)."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _rows_in(part: Tensor, whole: Tensor) -> tuple[bool, Rows]:
    """Whether an (out, in, ...) view is one of another's rows, and which: None for all."""
    if part.ndim != whole.ndim:  # the kernels of a convolution as a matrix, or the other way round
        part, whole = _flat_rows(part), _flat_rows(whole)
    if part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:]:
        return False, None
    strides = zip(part.shape, part.stride(), whole.stride(), strict=True)
    if any(size > 1 and own != other for size, own, other in strides):
        return False, None
    offset = part.storage_offset() - whole.storage_offset()
    first, rest = divmod(offset, whole.stride(0) or 1)
    if rest or first < 0 or first + len(part) > len(whole):
        return False, None
    return True, None if len(part) == len(whole) else (first, first + len(part))


def _flat_rows(view: Tensor) -> Tensor:
    """(out, in, ...) as (out, in * positions), where that is a view, too; else as it is."""
    flat = view.flatten(1) if view.ndim > 2 else view
    return flat if _storage(flat) == _storage(view) else view
