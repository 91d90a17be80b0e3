"""Tracing which weights samples reach in a model, and which come last on the way to its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from sparsefit.bare_model import base_modules
from sparsefit.calibration.batches import MicroBatch
from sparsefit.calibration.samples import numbers_in, tensors_in
from sparsefit.pruning.input_watch import Key, watching
from sparsefit.pruning.layers import PRODUCTS, matrices_of
from sparsefit.ranks import errors_on_all_ranks, from_all
from sparsefit.sharded import is_sharded, passes

FORMS = 8  # at most this many forms of samples are traced
_PRODUCTS = PRODUCTS.keys() | {torch.einsum, torch.tensordot, torch.bilinear, F.bilinear}


@dataclass(frozen=True)
class Trace:
    """What traced samples have shown about parameters of two or more dimensions, by their names in the bare model.

    Attributes:
        reached: The parameters that were used in computing a sample.
        shares: For each weight, or some of its rows, the number of elements in its input divided by that in the sample;
            None if a sample uses it more than once.
        outputs: For each tensor that the model returned, the last parameters on the way to it: after them nothing was
            multiplied by a parameter.
    """

    reached: frozenset[str]
    shares: Mapping[Key, Fraction | None]
    outputs: tuple[frozenset[str], ...]


def trace(model: nn.Module, data: Sequence[MicroBatch], forward: Callable[[Any], Any]) -> Trace | None:
    """Trace the first sample of each form (the same keys, the same number of tensors) through a model, on all ranks.

    Returns:
        The trace; None if there are no samples.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> trace(model, [MicroBatch(torch.ones(1, 2), origin=(0,))], model).outputs
    (frozenset({'2.weight'}),)
    """
    samples = {}
    for batch in data:
        if len(samples) == FORMS:
            break
        samples.setdefault(_form(batch.data), batch)
    tracer = _Tracer(matrix_names(model))
    shares: dict[Key, Fraction | None] = {}
    weights = [weight for name, module in base_modules(model).items() for weight in matrices_of(module, name)]
    outputs: list[frozenset[str]] = []
    batches = list(samples.values())

    def follow(number: int) -> None:
        sample, seen = batches[number].first_sample(), []
        noting = watching(weights, lambda one: seen.append((one.weight_rows, one.inputs.numel())))
        with noting, _hooked(model, tracer), tracer:
            result = forward(sample)
        uses, size = Counter(key for key, _ in seen), numbers_in(sample) or 1
        for key, numbers in seen:
            shares[key] = None if uses[key] > 1 else shares.get(key, Fraction(numbers, size))
        outputs.extend(found for tensor in output_tensors(result) if (found := tracer.last(tensor)))

    with errors_on_all_ranks():
        passes(model, follow, len(batches))
    shown = Trace(frozenset(tracer.reached), shares, tuple(dict.fromkeys(outputs))) if samples else None
    found = [one for one in from_all(shown) if one is not None]
    return Trace(frozenset().union(*(one.reached for one in found)), shares, found[0].outputs) if found else None


def matrix_names(model: nn.Module) -> dict[int, str]:
    """The name in the bare model of each parameter of two or more dimensions, by id; the first name of a shared one.

    >>> list(matrix_names(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))).values())
    ['0.weight']
    """
    names: dict[int, str] = {}
    for module_name, module in base_modules(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                names.setdefault(id(parameter), f"{module_name}.{name}".lstrip("."))
        for weight in matrices_of(module, module_name):  # packed ones have one dimension, or other names
            names.setdefault(id(weight.parameter), weight.name.partition("[")[0])
    return names


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors that a model returns: its `logits` if it has them, else the tensors at the top level.

    >>> output_tensors({"loss": torch.tensor(1.0), "logits": torch.tensor(2.0)}), output_tensors(None)
    ([tensor(2.)], [])
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [value for value in values if isinstance(value, Tensor)]


class _Tracer(TorchFunctionMode):
    """While active, records for each computed tensor the last parameters that were multiplied on the way to it."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.reached: set[str] = set()
        self._storages: dict[int, str] = {}
        self._sharded: list[tuple[nn.Module, str, str]] = []  # layer, the parameter's name in it and in the model
        self._buffers: set[int] = set()
        self._made_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # the parameters a tensor was computed from
        self._last: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # the last parameters on the way to a tensor

    def watch(self, model: nn.Module) -> None:
        """Register the memory of a model's parameters, to recognise views of them, and its buffers (not data)."""
        plain = (p for p in model.parameters() if id(p) in self.names and type(p) is nn.Parameter and p.numel())
        self._storages = {p.untyped_storage().data_ptr(): self.names[id(p)] for p in plain if p.device.type != "meta"}
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._sharded = [
            (layer, own, self.names[id(parameter)])
            for layer in model.modules()
            for own, parameter in layer.named_parameters(recurse=False)
            if is_sharded(parameter) and id(parameter) in self.names
        ]

    def last(self, output: Any) -> frozenset[str]:
        """The last parameters that were multiplied on the way to some tensors."""
        return frozenset().union(*(self._last.get(tensor, frozenset()) for tensor in tensors_in(output)))

    def mark(self, output: Any, found: frozenset[str]) -> None:
        """Record `found` as the last parameters on the way to the tensors in an output."""
        self._last.update(dict.fromkeys(tensors_in(output), found))

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = list(tensors_in([args, kwargs]))
        results = list(tensors_in(result)) or ([args[0]] if result is None and given and given[0] is args[0] else [])
        if not results:  # a call that only asks for a shape or a device
            return result
        weights = [self._weights_in(tensor) for tensor in given]
        used = frozenset().union(*weights)
        self.reached |= used
        if used and all(own or id(tensor) in self._buffers for tensor, own in zip(given, weights, strict=True)):
            self._made_of.update(dict.fromkeys(results, used))  # a weight in another form: cast, masked, low-rank
        elif found := used if used and func in _PRODUCTS else self.last(given):
            self.mark(results, found)
        return result

    def _weights_in(self, tensor: Tensor) -> frozenset[str]:
        """The parameters that a tensor is, is a view of, or was computed from."""
        if id(tensor) in self.names:
            return frozenset({self.names[id(tensor)]})
        if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:  # a gathered parameter in the place of its shard
            for layer, own, name in self._sharded:
                if layer.get_parameter(own) is tensor:
                    self.names[id(tensor)] = name  # it is the same object in each pass
                    return frozenset({name})
        if tensor in self._made_of:
            return self._made_of[tensor]
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return frozenset()
        name = self._storages.get(tensor.untyped_storage().data_ptr())
        return frozenset() if name is None else frozenset({name})


@contextmanager
def _hooked(model: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """Record layers by their calls if they multiply in kernels of their own (bitsandbytes)."""

    def called(name: str, layer: nn.Module, args: Any, output: Any) -> None:
        tracer.reached.add(name)
        if not tracer.last(output):
            tracer.mark(output, frozenset({name}))

    tracer.watch(model)
    with ExitStack() as hooks:
        for layer in model.modules():
            for weight in matrices_of(layer):
                if weight.called and (name := tracer.names.get(id(weight.parameter))):
                    hooks.enter_context(layer.register_forward_hook(partial(called, name)))
        yield


def _form(batch: Any) -> Any:
    """The structure of a batch; batches of one form are expected to take the same path through a model."""
    if isinstance(batch, Mapping):
        return tuple(sorted((str(key), _form(value)) for key, value in batch.items()))
    if isinstance(batch, list | tuple):
        return tuple(dict.fromkeys(map(_form, batch)))
    return f"tensor of {batch.ndim} dimensions" if isinstance(batch, Tensor) else type(batch).__name__
