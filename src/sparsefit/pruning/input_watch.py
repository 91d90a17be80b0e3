"""Observing the inputs of a model's weights while it runs, at the matrix product itself, whatever code computes it."""

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
Key = tuple[str, Rows]  # the name of a weight and which of its rows


class Seen(NamedTuple):
    """The input of a weight in one product.

    Attributes:
        weight: The weight.
        rows: Which of its rows, (start, stop); None means all. Query, key and value of attention can differ in inputs.
        inputs: The tensor that was passed to the product.
        version: The version of that tensor, which grows when it is changed in place.
        tokens: Gives the rows that the matrix multiplies.
        key: Distinguishes different views of one input tensor, such as the strides of a convolution.
        real: Which of the tokens are not padding, (tokens,) bool; None if all; or a reason why that is unknown.
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
        """The name of the weight, and which of its rows."""
        return self.weight.name, self.rows

    def same_input(self, other: Seen | None) -> bool:
        """Whether the input of another weight is the same."""
        if other is None or self.inputs is not other.inputs:
            return False
        return (self.version, self.key) == (other.version, other.key)


class _Watch(TorchFunctionMode):
    """While active, calls `record` with a `Seen` just before each product. It is the `see` of the handlers."""

    def __init__(self, weights: Iterable[PrunableWeight], record: Callable[[Seen], None]) -> None:
        super().__init__()
        self._record = record
        self._by_storage: dict[int, list[PrunableWeight]] = {}
        self._sharded: list[PrunableWeight] = []  # their gathered parameters have new memory each time,
        self._gathered: dict[int, tuple[Tensor, list[PrunableWeight]]] = {}  # but are the same objects: by id
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
        """The weights with which a tensor shares memory."""
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
    """Inside the context, call `record` with each input of each weight.

    If the product of a called layer is not seen, because bitsandbytes computes it in its own kernels, the layer's
    argument is recorded. All hooks are removed afterwards, even after an error.

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
    """Evaluation mode, without anything that would hide a layer's input or use stale weights: no key-value caches,
    fused attention, compiled blocks or cached autocast copies of weights. Everything is restored afterwards.

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
    """Yield (..., in) inputs as one (tokens, in) tensor."""
    yield inputs.detach().reshape(-1, inputs.shape[-1])


def _storage(tensor: object) -> int:
    """The address of a tensor's storage, which views share; 0 if it is empty or not a plain dense tensor."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _rows_in(part: Tensor, whole: Tensor) -> Rows:
    """The rows (start, stop) of the (out, in, ...) view `whole` that `part` is; None if it is not some of its rows."""
    if part.ndim != whole.ndim:  # the kernels of a convolution as a matrix, or the other way round
        flat = as_matrix(part), as_matrix(whole)
        if any(_storage(matrix) != _storage(part) for matrix in flat):  # flattening made a copy
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
    """Which of the rows that a weight multiplies are not padding, (tokens,) bool in their order; None if the mask does
    not apply to these inputs; a string with the reason if it is unknown.

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
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):  # their tokens come sequence by sequence
        return real.flatten() if inputs.ndim == 3 and inputs.shape[:2] in (real.shape, real.t().shape) else None
    if seen.weight.view.ndim > 2:  # (batch, channels, positions)
        lead = (inputs.shape[0], *inputs.shape[2:])
        return real.flatten() if lead == real.shape else "of a signal" if mask.of_signal else None
    lead = tuple(inputs.shape[:-1])
    if mask.of_signal and len(lead) == 2 and lead[0] == len(real) and real.shape[1] % lead[1] == 0:
        real = real[:, :: real.shape[1] // lead[1]]  # as a convolution with that stride samples them
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
        return "several audio frames form one hidden state"
    if len(lead) == 1 and lead[0] < total and lead[0] not in (batch, int(real.sum())):
        return "only some tokens come"
    return None


def _spread(real: Tensor, lead: tuple[int, ...], places: tuple[int, int]) -> Tensor:
    shape = [size if place in places else 1 for place, size in enumerate(lead)]
    return real.reshape(shape).expand(lead).flatten()
