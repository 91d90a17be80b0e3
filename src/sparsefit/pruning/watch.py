"""Seeing what a model's weights are multiplied by while it runs: at the product itself, whoever computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefit.calibration.padding_masks import PaddingMask
from sparsefit.pruning.layers import PRODUCTS
from sparsefit.pruning.layers.base import PrunableWeight, Tokens, as_matrix
from sparsefit.pruning.layers.experts import eager_experts
from sparsefit.pruning.layers.sharded import ShardedWeight
from sparsefit.quantized import plain_layout

Rows = tuple[int, int] | None
Key = tuple[str, Rows]  # a weight and which of its rows


class Seen(NamedTuple):
    """What a weight is multiplied by in one product.

    Attributes:
        weight: Which weight.
        rows: Which of its rows, (start, stop); None is all. Those for query, key and value of attention can differ.
        inputs: The tensor as the product was given it.
        version: Grows when that tensor is changed in place.
        tokens: What the matrix multiplies.
        key: Tells apart what is taken from one tensor in different ways.
        real: Which of the tokens are no padding, (tokens,) bool; None if all are; or why that cannot be told.
    """

    weight: PrunableWeight
    rows: Rows
    inputs: Tensor
    version: int
    tokens: Tokens
    key: Hashable = None
    real: Tensor | str | None = None

    @property
    def weight_rows(self) -> Key:
        """Names the weight, and which of its rows."""
        return self.weight.name, self.rows

    def same_input(self, other: Seen | None) -> bool:
        """Whether another weight is multiplied by the very same."""
        if other is None or self.inputs is not other.inputs:
            return False
        return (self.version, self.key) == (other.version, other.key)


class _Watch(TorchFunctionMode):
    """While active, hands a `Seen` to `record` just before each product; it is what the handlers call `see`."""

    def __init__(self, weights: Iterable[PrunableWeight], record: Callable[[Seen], None]) -> None:
        super().__init__()
        self._record = record
        self._by_storage: dict[int, list[PrunableWeight]] = {}
        self._sharded: list[PrunableWeight] = []  # whole ones have other memory each time that they are gathered,
        self._gathered: dict[int, tuple[Tensor, list[PrunableWeight]]] = {}  # but are the same parameters, by id
        for weight in weights:
            if isinstance(weight, ShardedWeight):
                self._sharded.append(weight)
            elif storage := _storage(weight.parameter):
                self._by_storage.setdefault(storage, []).append(weight)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handler = PRODUCTS.get(func)
        return handler(func, args, kwargs or {}, self) if handler else func(*args, **(kwargs or {}))

    def holds(self, tensor: Tensor) -> bool:
        return bool(self._found(tensor))

    def _found(self, tensor: Tensor) -> list[PrunableWeight]:
        """The weights that a tensor is a view of, or of which it is one."""
        storage = _storage(tensor)
        if not storage or not self._sharded or storage in self._by_storage:
            return self._by_storage.get(storage, [])
        if id(tensor) in self._gathered:
            return self._gathered[id(tensor)][1]
        found = [weight for weight in self._sharded if _storage(weight.in_product) == storage]
        if isinstance(tensor, nn.Parameter):
            self._gathered[id(tensor)] = tensor, found
        return found

    def __call__(self, weight: Tensor, inputs: Tensor, tokens: Tokens | None = None, key: Hashable = None) -> None:
        for watched in self._found(weight):
            whole = watched.in_product
            rows = _rows_in(weight, whole)
            if rows and inputs.numel():
                rows = None if rows == (0, len(whole)) else rows
                tokens = tokens or partial(_flat, inputs)
                self._record(Seen(watched, rows, inputs, version_of(inputs), tokens, key))


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

    def leave(weight: PrunableWeight, layer: nn.Module, *_: Any) -> None:
        inputs = called.pop(id(layer), None)
        if inputs is not None and inputs.numel():
            record(Seen(weight, None, inputs, version_of(inputs), partial(_flat, inputs)))

    with ExitStack() as hooks:
        for weight in weights:
            for layer in weight.layers if weight.called else ():
                hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(partial(leave, weight)))
        with _Watch(weights, seen):
            yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing that would hide a layer's input or compute with weights of before: no key-value
    caches, fused attention, compiled blocks or autocast copies of weights. All as it was afterwards.

    >>> with evaluating(model := nn.Dropout()): print(model.training)
    False
    """
    fused = torch.backends.mha
    with ExitStack() as stack:
        for module in model.modules():
            if module.training:
                stack.callback(setattr, module, "training", True)
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", False) is True:
                stack.callback(setattr, config, "use_cache", True)
                config.use_cache = False
        stack.callback(fused.set_fastpath_enabled, fused.get_fastpath_enabled())
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        fused.set_fastpath_enabled(False)
        torch.set_autocast_cache_enabled(False)
        model.eval()
        with torch.compiler.set_stance("force_eager"), eager_experts(model), plain_layout(model):
            yield


def version_of(tensor: Tensor) -> int:
    """A number that grows when a tensor is changed in place (0 for inference tensors, which keep none).

    >>> version_of(torch.ones(2).add_(1).add_(1))
    2
    """
    return 0 if tensor.is_inference() else tensor._version


def _flat(inputs: Tensor) -> Iterator[Tensor]:
    """(..., in) as one piece of (tokens, in)."""
    yield inputs.detach().reshape(-1, inputs.shape[-1])


def _storage(tensor: object) -> int:
    """What a view shares with its parameter; 0 if it is empty or no plain tensor (quantized, sparse, distributed)."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _rows_in(part: Tensor, whole: Tensor) -> Rows:
    """Which rows of an (out, in, ...) view another one is; None if it is none."""
    if part.ndim != whole.ndim:  # the kernels of a convolution as a matrix, or the other way round
        flat = as_matrix(part), as_matrix(whole)
        if any(_storage(matrix) != _storage(part) for matrix in flat):  # what is no view is a copy
            return None
        part, whole = flat
    if part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:]:
        return None
    strides = zip(part.shape, part.stride(), whole.stride(), strict=True)
    if any(size > 1 and own != other for size, own, other in strides):
        return None
    first, rest = divmod(part.storage_offset() - whole.storage_offset(), whole.stride(0) or 1)
    inside = not rest and first >= 0 and first + len(part) <= len(whole)
    return (first, first + len(part)) if inside else None


def real_rows(mask: PaddingMask, seen: Seen) -> Tensor | str | None:
    """Which of the rows that a weight multiplies are no padding, (tokens,) bool in their order; None if the inputs are
    none of the mask's sequences; a word for why it cannot be told.

    >>> import torch
    >>> from sparsefit.pruning.layers import matrices_of
    >>> [weight], mask = matrices_of(nn.Linear(4, 4)), torch.tensor([[True, False], [True, True]])
    >>> seen = Seen(weight, None, torch.ones(2, 2, 4), 0, lambda: iter(()), None)
    >>> real_rows(PaddingMask(mask, mask), seen)
    tensor([ True, False,  True,  True])
    """
    real, layer, inputs = mask.real, seen.weight.layers[0], seen.inputs
    if seen.weight.index is not None:
        return "experts get tokens in an order of their own"
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):  # these give theirs sequence by sequence
        return real.flatten() if inputs.ndim == 3 and inputs.shape[:2] in (real.shape, real.t().shape) else None
    if seen.weight.view.ndim > 2:  # (batch, channels, positions)
        lead = (inputs.shape[0], *inputs.shape[2:])
        return real.flatten() if lead == real.shape else "of a signal" if mask.of_signal else None
    lead = tuple(inputs.shape[:-1])
    if mask.of_signal and len(lead) == 2 and lead[0] == len(real) and real.shape[1] % lead[1] == 0:
        real = real[:, :: real.shape[1] // lead[1]]  # as a convolution of that stride goes over them
    return _expanded(real, lead, mask)


def _expanded(real: Tensor, lead: tuple[int, ...], mask: PaddingMask) -> Tensor | str | None:
    """A (batch, sequence) mask for inputs (*lead, in)."""
    (batch, length), total = real.shape, real.numel()
    by_step = lead[:2] == (length, batch)
    if by_step and (mask.seq_first or lead[:2] != (batch, length)):
        return _spread(real.t(), lead, (0, 1))
    if len(lead) > 1 and lead[0] == batch and length in lead[1:]:
        return _spread(real, lead, (0, lead.index(length, 1)))
    if math.prod(lead) == total:
        return (real.t() if mask.seq_first and len(lead) == 1 else real).flatten()
    if mask.of_signal:
        return "several samples of a signal make one state"
    if len(lead) == 1 and lead[0] < total and lead[0] not in (batch, int(real.sum())):
        return "only some tokens come"
    return None


def _spread(real: Tensor, lead: tuple[int, ...], places: tuple[int, int]) -> Tensor:
    shape = [size if place in places else 1 for place, size in enumerate(lead)]
    return real.reshape(shape).expand(lead).flatten()
