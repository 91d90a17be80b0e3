"""Calibration data: samples without padding, regrouped to micro-batches of one size; calling a model with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.errors import CalibrationError
from sparsefit.pruning.ranks import errors_on_all_ranks

Forward = Callable[[Any], Any]


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
        samples = _split_samples(self.data)
        return samples[0] if samples else self.data

    @property
    def padding_mask(self) -> Tensor | None:
        """(batch, sequence) bool, True = a real token; None if all are."""
        mask = self.data.get("attention_mask") if isinstance(self.data, Mapping) else None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
            return None
        return mask.bool()


def regroup(batches: Iterable[Any], size: int, encoder_decoder: bool = False) -> Iterator[MicroBatch]:
    """The samples of all batches in micro-batches of one size, however the batches were cut.

    Samples lose their padding; consecutive ones of equal shape go together. So the same samples go through
    the model in the same company, and give the same masks to the bit, whatever the loader's batch size.
    A batch whose structure does not show its samples goes through whole.

    >>> [batch.origin for batch in regroup([torch.zeros(2, 5), torch.zeros(3, 5)], size=4)]
    [(0, 0, 1, 1), (1,)]
    """
    for shapes, alike in groupby(_samples(batches, encoder_decoder), key=lambda found: found[0]):
        while group := list(islice(alike, 1 if shapes is None else size)):
            samples = [sample for _, sample, _ in group]
            data = samples[0] if shapes is None else map_tensors(lambda *parts: torch.cat(parts), *samples)
            yield MicroBatch(data, tuple(index for _, _, index in group))


def _samples(batches: Iterable[Any], encoder_decoder: bool) -> Iterator[tuple[list[torch.Size] | None, Any, int]]:
    """The shapes of each sample, the sample without padding and the index of its batch; shapes None for a batch that
    goes through whole. Samples of padding alone are left out."""
    for index, batch in enumerate(batches):
        samples = _split_samples(batch)
        if samples is None:
            yield None, batch, index
            continue
        for padded in samples:
            sample = _without_padding(padded, encoder_decoder)
            mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
            if not isinstance(mask, Tensor) or mask.numel():
                yield [tensor.shape for tensor in tensors_in(sample)], sample, index


def _split_samples(batch: Any) -> list[Any] | None:
    """A batch as a list of batches of one sample, or None if its tensors do not agree on their first dimension, or
    it holds something else for each sample (a list of texts)."""
    tensors = list(tensors_in(batch))
    if not tensors or any(t.ndim == 0 for t in tensors) or len({len(t) for t in tensors}) != 1:
        return None
    if len(tensors[0]) in map(len, _lists_without_tensors(batch)):
        return None
    return [map_tensors(lambda t, i=i: t[i : i + 1], batch) for i in range(len(tensors[0]))]


def _without_padding(sample: Any, encoder_decoder: bool) -> Any:
    """A sample of one sequence without the padding at its ends; other samples as they are.

    The labels of an encoder-decoder model are the decoder's, and padded with -100.
    """
    if not isinstance(sample, Mapping):
        return sample
    trimmed = dict(sample)
    labels = sample.get("labels")
    if encoder_decoder and isinstance(labels, Tensor) and labels.ndim == 2 and "decoder_attention_mask" not in sample:
        real = (labels[0] != -100).nonzero().squeeze(1)
        trimmed["labels"] = labels[:, : int(real[-1]) + 1 if len(real) else 0]
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = sample.get(key)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            continue
        real = mask[0].nonzero().squeeze(1)
        start, end = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        for name, value in sample.items():
            of_decoder = name.startswith("decoder_") or (encoder_decoder and name == "labels")
            same_side = of_decoder == key.startswith("decoder_")
            if same_side and isinstance(value, Tensor) and value.shape[:2] == mask.shape:
                trimmed[name] = value[:, start:end]
    return trimmed


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, however its mappings, lists and tuples are nested.

    >>> list(tensors_in({"text": "hello", "ids": [torch.tensor(1), (torch.tensor(2),)]}))
    [tensor(1), tensor(2)]
    """
    if isinstance(batch, Tensor):
        yield batch
    for value in _members(batch):
        yield from tensors_in(value)


def _lists_without_tensors(batch: Any) -> Iterator[list[Any] | tuple[Any, ...]]:
    if isinstance(batch, list | tuple) and not any(True for _ in tensors_in(batch)):
        yield batch
    else:
        for value in _members(batch):
            yield from _lists_without_tensors(value)


def _members(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    return batch if isinstance(batch, list | tuple) else ()


def map_tensors(function: Callable[..., Tensor], *batches: Any) -> Any:
    """Apply a function to the corresponding tensors of batches of one structure; the rest is taken from the first.

    >>> map_tensors(torch.add, {"ids": torch.tensor(1), "text": "a"}, {"ids": torch.tensor(2), "text": "b"})
    {'ids': tensor(3), 'text': 'a'}
    """
    first = batches[0]
    if isinstance(first, Tensor):
        return function(*batches)
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *(batch[key] for batch in batches)) for key in first}
    if isinstance(first, list | tuple):
        values = [map_tensors(function, *values) for values in zip(*batches, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device.

    >>> to_device([torch.zeros(2), "text"], torch.device("meta"))
    [tensor(..., device='meta', size=(2,)), 'text']
    """
    return map_tensors(lambda t: t.to(device), batch)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a mapping (as keyword arguments), a tuple or list (as arguments) or one tensor.

    Raises:
        CalibrationError: if the model cannot take such a batch. What the model itself raises is passed on.

    >>> call_model(nn.Flatten(), {"input": torch.zeros(2, 3, 4)}).shape
    torch.Size([2, 12])
    """
    if not isinstance(batch, Mapping | list | tuple | Tensor):
        raise CalibrationError(
            f"a calibration batch is {type(batch).__name__}; it must be a mapping, a tuple or a tensor"
        )
    if isinstance(batch, Tensor):
        batch = (batch,)
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
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
    """A batch of positional arguments as a mapping if an attention mask is among them, so that padding is seen.

    >>> with_names(nn.Flatten(), (1,))
    (1,)
    """
    if not isinstance(batch, list | tuple):
        return batch
    try:
        named = inspect.signature(model.forward).bind(*batch).arguments
    except TypeError:  # call_model says what is wrong
        return batch
    return named if "attention_mask" in named else batch


def calibration_data(
    model: nn.Module, batches: Iterable[Any] | None, size: int, forward: Forward | None, needed_by: str
) -> list[MicroBatch]:
    """The calibration samples of a model in micro-batches.

    Args:
        model: The model.
        batches: As `prune` takes them.
        size: Samples in a micro-batch.
        forward: How a batch goes through the model, if not as its arguments.
        needed_by: What needs them, for the error.

    Raises:
        CalibrationError: on every rank, if there are none on one.

    >>> calibration_data(nn.Flatten(), [torch.zeros(3, 5)], size=2, forward=None, needed_by="wanda")[1].data.shape
    torch.Size([1, 5])
    """
    with errors_on_all_ranks():
        if batches is None:
            raise CalibrationError(f"{needed_by} needs calibration data and there is none: give `batches`")
        if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
            raise CalibrationError(
                f"`batches` is {type(batches).__name__}; it must be an iterable of batches: for a single one, give "
                "[batch]"
            )
        if forward is None:
            batches = (with_names(model, batch) for batch in batches)
        configs = (getattr(module, "config", None) for module in model.modules())
        encoder_decoder = any(getattr(config, "is_encoder_decoder", False) is True for config in configs)
        data = list(regroup(batches, size, encoder_decoder))
        if not data:
            raise CalibrationError(
                f"{needed_by} needs calibration data and there is none: the source yielded no batch (was an iterator "
                "used up before?)"
            )
    return data


def forward_of(model: nn.Module, forward: Forward | None) -> Forward:
    """How a batch goes through a model: as it is said, or as its arguments, on its device.

    >>> forward_of(nn.Flatten(), None)(torch.zeros(2, 3, 4)).shape
    torch.Size([2, 12])
    """
    device = device_of(model)
    return forward or (lambda batch: call_model(model, to_device(batch, device)))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter.

    >>> device_of(nn.Linear(3, 5))
    device(type='cpu')
    """
    return next((p.device for p in model.parameters()), torch.device("cpu"))
