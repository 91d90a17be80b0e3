"""Calibration data: samples without padding, regrouped in micro-batches of one size; calling a model with them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.calibration.padding import PaddingWatch, Scope
from sparsefit.calibration.padding_masks import PaddingMask
from sparsefit.calibration.samples import count_samples, cut_batch, join_samples, map_tensors, split_samples, tensors_in
from sparsefit.calibration.trimming import Look, Looking, join_masks, mask_named, without_padding
from sparsefit.errors import CalibrationError
from sparsefit.ranks import errors_on_all_ranks, from_all, number_of_ranks, own_rank
from sparsefit.sharded import units_of

Forward = Callable[[Any], Any]


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together.

    Attributes:
        data: The samples, in the form of the batches they come from.
        origin: For each sample the index of its batch.
        mask: The padding mask, as far as it is known before the model runs.
        watch: Observes the padding masks that the model uses.
        scopes: The masks that `watch` found to hold in each module, by the module's id.
    """

    data: Any
    origin: tuple[int, ...]
    mask: PaddingMask | None = None
    watch: PaddingWatch | None = None
    scopes: dict[int, Scope] = field(default_factory=dict, compare=False, repr=False)

    def first_sample(self) -> Any:
        """A batch of its first sample alone, or all of it if it cannot be split."""
        return cut_batch(self.data, 1)

    def begin(self) -> None:
        """Tell the watch that this micro-batch runs next."""
        if self.watch is not None:
            self.watch.begin(self.mask, self.scopes)

    def mask_of(self, inputs: Tensor) -> PaddingMask | None:
        """While this micro-batch runs, the mask of the sequences of a weight's inputs; None if nothing is padding."""
        return (Scope(self.mask) if self.watch is None else self.watch.scope).mask_of(inputs)


def regroup(
    batches: Iterable[Any],
    size: int,
    encoder_decoder: bool = False,
    look: Look | None = None,
    watch: PaddingWatch | None = None,
) -> Iterator[MicroBatch]:
    """Regroup the samples of all batches in micro-batches of one size.

    Samples lose their padding, and consecutive samples of equal shape are joined. So the micro-batches, and with them
    the masks bit for bit, do not depend on the loader's batch size. A batch whose structure does not show its samples
    becomes one micro-batch.

    Args:
        batches: The batches.
        size: Samples in a micro-batch.
        encoder_decoder: Whether the model is an encoder-decoder.
        look: Finds the masks that the model makes for a batch without an attention mask.
        watch: The `watch` of the micro-batches.

    >>> [batch.origin for batch in regroup([torch.zeros(2, 5), torch.zeros(3, 5)], size=4)]
    [(0, 0, 1, 1), (1,)]
    """
    for shapes, alike in groupby(_samples(batches, encoder_decoder, look), key=lambda found: found[0]):
        while group := list(islice(alike, 1 if shapes is None else size)):
            samples, masks, origins = zip(*(found[1:] for found in group), strict=True)
            origin = tuple(index for own in origins for index in own)
            yield MicroBatch(join_samples(list(samples)), origin, join_masks(masks), watch)


def _samples(
    batches: Iterable[Any], encoder_decoder: bool, look: Look | None
) -> Iterator[tuple[list[torch.Size] | None, Any, PaddingMask | None, tuple[int, ...]]]:
    """For each sample its shapes, the sample without padding, the mask of any padding left in it, and the index of its
    batch; shapes are None for a batch that cannot be split. Samples of nothing but padding are left out."""
    for index, batch in enumerate(batches):
        samples = split_samples(batch)
        if samples is None:
            yield None, batch, mask_named(batch), (index,) * count_samples(batch)
            continue
        for padded in samples:
            found = without_padding(padded, encoder_decoder, look)
            if found is not None:
                sample, mask = found
                yield [tensor.shape for tensor in tensors_in(sample)], sample, mask, (index,)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device.

    >>> to_device([torch.zeros(2), "text"], torch.device("meta"))
    [tensor(..., device='meta', size=(2,)), 'text']
    """
    return map_tensors(lambda t: t.to(device), batch)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a mapping (as keyword arguments), a tuple or list (as arguments) or one tensor.

    Raises:
        CalibrationError: if the model cannot take such a batch. Errors that the model itself raises are passed on.

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
    """Turn a batch of positional arguments into a mapping if it has an attention mask, so that padding is found.

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
    model: nn.Module,
    batches: Iterable[Any] | None,
    size: int,
    forward: Forward | None,
    needed_by: str,
    watch: PaddingWatch | None = None,
) -> list[MicroBatch]:
    """The calibration samples of a model in micro-batches.

    If all ranks of a distributed run have the same samples, each takes its share of the micro-batches. If they have
    different samples, or there are fewer micro-batches than ranks, each takes all of its own.

    Args:
        model: The model.
        batches: As `prune` takes them.
        size: Samples in a micro-batch.
        forward: Runs the model on a batch, if not by calling it.
        needed_by: What needs the data, for the error message.
        watch: Observes the model's masks.

    Raises:
        CalibrationError: on every rank, if a rank has no samples.

    >>> calibration_data(nn.Flatten(), [torch.zeros(3, 5)], size=2, forward=None, needed_by="wanda")[1].data.shape
    torch.Size([1, 5])
    """
    with errors_on_all_ranks():
        if batches is None:
            raise CalibrationError(f"{needed_by} needs calibration data and there is none: give `batches`")
        batches = checked_batches(batches)
        if forward is None:
            batches = (with_names(model, batch) for batch in batches)
        configs = (getattr(module, "config", None) for module in model.modules())
        encoder_decoder = any(getattr(config, "is_encoder_decoder", False) is True for config in configs)
        looks = watch is not None and watch.follows and not units_of(model)  # which need all ranks
        look = Looking(watch, forward_of(model, forward)) if looks else None
        data = list(regroup(batches, size, encoder_decoder, look, watch))
        if not data:
            raise CalibrationError(
                f"{needed_by} needs calibration data and there is none: the source yielded no batch (was an iterator "
                "used up before?)"
            )
    return _own_share(data)


def checked_batches(batches: Any) -> Iterable[Any]:
    """The batches, if they are an iterable of batches.

    Raises:
        CalibrationError: if they are a single one, or nothing to iterate over.

    >>> checked_batches([torch.zeros(1)])
    [tensor([0.])]
    """
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"`batches` is {type(batches).__name__}; it must be an iterable of batches: for a single one, give [batch]"
        )
    return batches


def _own_share(data: list[MicroBatch]) -> list[MicroBatch]:
    ranks = number_of_ranks()
    if ranks == 1:
        return data
    all_alike = len(set(from_all(digest([batch.data for batch in data])))) == 1
    return data[own_rank() :: ranks] if all_alike and len(data) >= ranks else data


def digest(batch: Any) -> str:
    """A hexadecimal digest of the values, shapes and dtypes of a batch's tensors, and of what it holds beside them.

    >>> digest([torch.zeros(2)]) == digest([torch.zeros(2)]), digest([torch.zeros(2)]) == digest([torch.ones(2)])
    (True, False)
    """
    sha = hashlib.sha256(repr(map_tensors(lambda _: torch.empty(0), batch)).encode())
    for tensor in tensors_in(batch):
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def passing(data: Iterable[MicroBatch], watch: PaddingWatch, forward: Forward) -> Forward:
    """Wrap `forward` so that the padding watch is told which micro-batch runs.

    >>> passing([], PaddingWatch(follows=False), print)("batch")
    batch
    """
    by_data = {id(batch.data): batch for batch in data}

    def passed(batch: Any) -> Any:
        if id(batch) in by_data:
            by_data[id(batch)].begin()
        else:
            watch.begin(None, {})
        return forward(batch)

    return passed


def forward_of(model: nn.Module, forward: Forward | None) -> Forward:
    """The given `forward`, or by default a function that calls the model with a batch on its device.

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
