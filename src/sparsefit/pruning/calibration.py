"""From batches to input statistics: regrouping samples, leaving out padding, watching the inputs of layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.errors import CalibrationError
from sparsefit.pruning.blocks import version_of
from sparsefit.pruning.statistics import InputStatistics, squared_norms
from sparsefit.pruning.weights import PrunableWeight


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once.

    Attributes:
        data: In the form of the batches it comes from.
        origin: For each sample (or once, if the batch was not taken apart) the index of its batch.
    """

    data: Any
    origin: tuple[int, ...]

    def first_sample(self) -> Any:
        """A batch of its first sample alone, or all of it if it cannot be taken apart."""
        samples = split_samples(self.data)
        return samples[0] if samples else self.data

    @property
    def padding_mask(self) -> Tensor | None:
        """(batch, sequence) bool, True = a real token; None if all are."""
        mask = self.data.get("attention_mask") if isinstance(self.data, Mapping) else None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
            return None
        return mask.bool()


def regroup(batches: Iterable[Any], size: int) -> Iterator[MicroBatch]:
    """The samples of all batches in micro-batches of one size, however the batches were cut.

    Samples lose their padding; consecutive ones of equal shape go together. So the same samples go through
    the model in the same company, and give the same masks to the bit, whatever the loader's batch size.
    A batch whose structure does not show its samples goes through whole.
    """
    group: list[Any] = []
    origin: list[int] = []
    for index, batch in enumerate(batches):
        samples = split_samples(batch)
        if samples is None:
            if group:
                yield MicroBatch(_join(group), tuple(origin))
            yield MicroBatch(batch, (index,))
            group, origin = [], []
            continue
        for sample in filter(_has_tokens, map(without_padding, samples)):
            if group and (len(group) == size or _shapes(sample) != _shapes(group[0])):
                yield MicroBatch(_join(group), tuple(origin))
                group, origin = [], []
            group.append(sample)
            origin.append(index)
    if group:
        yield MicroBatch(_join(group), tuple(origin))


def split_samples(batch: Any) -> list[Any] | None:
    """A batch as a list of batches of one sample, or None if its tensors do not agree on their first dimension, or
    it holds something else for each sample (a list of texts)."""
    tensors = list(tensors_in(batch))
    if not tensors or any(t.ndim == 0 for t in tensors) or len({len(t) for t in tensors}) != 1:
        return None
    if len(tensors[0]) in map(len, _lists_without_tensors(batch)):
        return None
    return [_map_tensors(lambda t, i=i: t[i : i + 1], batch) for i in range(len(tensors[0]))]


def without_padding(sample: Any) -> Any:
    """A sample of one sequence without the padding at its ends; other samples as they are."""
    if not isinstance(sample, Mapping):
        return sample
    trimmed = dict(sample)
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = sample.get(key)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            continue
        real = mask[0].nonzero().squeeze(1)
        start, end = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        for name, value in sample.items():
            same_side = name.startswith("decoder_") == key.startswith("decoder_")
            if same_side and isinstance(value, Tensor) and value.shape[:2] == mask.shape:
                trimmed[name] = value[:, start:end]
    return trimmed


def _has_tokens(sample: Any) -> bool:
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
    return not isinstance(mask, Tensor) or mask.numel() > 0


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, however its mappings, lists and tuples are nested."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors_in(value)


def _lists_without_tensors(batch: Any) -> Iterator[list[Any] | tuple[Any, ...]]:
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from _lists_without_tensors(value)
    elif isinstance(batch, list | tuple):
        if not any(True for _ in tensors_in(batch)):
            yield batch
            return
        for value in batch:
            yield from _lists_without_tensors(value)


def _map_tensors(function: Callable[..., Tensor], *batches: Any) -> Any:
    """Apply a function to the corresponding tensors of batches of one structure; the rest is taken from the first."""
    first = batches[0]
    if isinstance(first, Tensor):
        return function(*batches)
    if isinstance(first, Mapping):
        return {key: _map_tensors(function, *(batch[key] for batch in batches)) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_map_tensors(function, *values) for values in zip(*batches, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(_map_tensors(function, *values) for values in zip(*batches, strict=True))
    return first


def _join(samples: list[Any]) -> Any:
    return _map_tensors(lambda *parts: torch.cat(parts), *samples)


def _shapes(sample: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_in(sample)]


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    return _map_tensors(lambda t: t.to(device), batch)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a mapping (as keyword arguments), a tuple or list (as arguments) or one tensor.

    Raises:
        CalibrationError: if the model cannot take such a batch. What the model itself raises is passed on.
    """
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, list | tuple):
        args, kwargs = tuple(batch), {}
    elif isinstance(batch, Tensor):
        args, kwargs = (batch,), {}
    else:
        raise CalibrationError(
            f"a calibration batch is {type(batch).__name__}; it must be a mapping, a tuple or a tensor"
        )
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        given = f"the keys {', '.join(map(str, kwargs))}" if kwargs else f"{len(args)} positional values"
        raise CalibrationError(
            f"{type(model).__name__} cannot take a calibration batch with {given}: {error}. It takes "
            f"{inspect.signature(model.forward)}; yield batches of that form or give prune a `forward`"
        ) from error
    return model(*args, **kwargs)


def with_names(model: nn.Module, batch: Any) -> Any:
    """A batch of positional arguments as a mapping if an attention mask is among them, so that padding is seen."""
    if not isinstance(batch, list | tuple):
        return batch
    try:
        named = inspect.signature(model.forward).bind(*batch).arguments
    except TypeError:  # call_model says what is wrong
        return batch
    return named if "attention_mask" in named else batch


class InputRecorder:
    """Collects the statistics of the inputs of some weights' layers while a model runs.

    Attributes:
        statistics: By weight name.
        notes: What could not be told, for the report.
    """

    def __init__(self, weights: Iterable[PrunableWeight]) -> None:
        self.weights = list(weights)
        self.statistics = {
            weight.name: InputStatistics(weight.matrix().shape[1], weight.parameter.device) for weight in self.weights
        }
        self.notes: set[str] = set()
        self._batch: MicroBatch | None = None
        self._padding: Tensor | None = None
        self._last: tuple[Tensor, int, Tensor, int] | None = None  # q, k and v get one and the same input

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the layers' inputs; hooks are gone afterwards, whatever happens."""
        handles = [
            layer.register_forward_pre_hook(self._hook(weight), with_kwargs=True)
            for weight in self.weights
            for layer in weight.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def next_batch(self, batch: MicroBatch) -> None:
        """Say which micro-batch runs next."""
        self._batch, self._padding, self._last = batch, batch.padding_mask, None

    def _hook(self, weight: PrunableWeight) -> Callable[..., None]:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            version = version_of(inputs)
            if self._last is None or self._last[0] is not inputs or self._last[1] != version:
                tokens = self._real_tokens(inputs, weight.name)
                self._last = (inputs, version, squared_norms(tokens), len(tokens))
            _, _, norms, count = self._last
            if not bool(norms.isfinite().all()):
                self._raise_not_finite(weight.name, inputs)
            self.statistics[weight.name].add(norms.to(weight.parameter.device), count)

        return record

    def _real_tokens(self, inputs: Tensor, name: str) -> Tensor:
        """(..., in) inputs as (tokens, in), without the positions that are padding."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        if self._padding is None:
            return flat
        if len(flat) != self._padding.numel():
            self.notes.add(f"{name}: padding could not be told from tokens in inputs of shape {tuple(inputs.shape)}")
            return flat
        return flat[self._padding.flatten().to(flat.device)]

    def _raise_not_finite(self, name: str, inputs: Tensor) -> None:
        origin = self._batch.origin if self._batch is not None else ()
        if origin and len(inputs) % len(origin) == 0:  # samples one after the other, each alone or token by token
            finite = inputs.float().square().isfinite().reshape(len(origin), -1).all(dim=1).tolist()
            origin = tuple(batch for batch, fine in zip(origin, finite, strict=True) if not fine)[:1] or origin
        batches = " or ".join(map(str, dict.fromkeys(origin))) or "?"
        raise CalibrationError(
            f"the inputs of {name} are NaN or infinite in calibration batch {batches}. The model was left as it was; "
            "look at that batch, or run the model in float32 or bfloat16 if it overflows in float16"
        )
