"""Removing the padding at the ends of samples before they reach the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsefit.calibration.padding import MaskSeen, PaddingWatch
from sparsefit.calibration.padding_masks import PaddingMask, until_last
from sparsefit.calibration.samples import map_tensors, tensors_in

Look = Callable[[Any], MaskSeen | None]

_TRIES = 2
"""After this many samples without any mask, the model is assumed to make none."""


class Looking:
    """Finds the masks that a model makes for a batch, by running it up to the first call with a mask.

    Args:
        watch: Observes the masks.
        forward: Runs the model on a batch.
    """

    def __init__(self, watch: PaddingWatch, forward: Callable[[Any], Any]) -> None:
        self._watch, self._forward = watch, forward
        self._tries = _TRIES

    def __call__(self, batch: Any) -> MaskSeen | None:
        """The first call with masks; None if there is none, or the model raises an error for the batch."""
        if not self._tries:
            return None
        self._watch.begin(None, {})
        self._watch.stops = True
        try:
            self._forward(batch)
        except MaskSeen as seen:
            self._tries = _TRIES
            return seen
        except Exception:  # it is raised again in the pass that needs this batch
            self._tries = 0
            return None
        finally:
            self._watch.stops = False
        self._tries -= 1
        return None


def mask_named(batch: Any) -> PaddingMask | None:
    """The padding mask from a mapping's `attention_mask`; None without one, or if nothing is padding.

    >>> mask_named({"attention_mask": torch.tensor([[1, 0]])}).real
    tensor([[ True, False]])
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return PaddingMask(mask.bool(), mask, of_signal=_is_sound(batch, mask))


def join_masks(masks: Iterable[PaddingMask | None]) -> PaddingMask | None:
    """Join the masks of samples of one length; None stands for a sample without padding.

    >>> join_masks([PaddingMask(torch.tensor([[True, False]]), torch.ones(1, 2)), None]).real.tolist()
    [[True, False], [True, True]]
    """
    masks = list(masks)
    found = [mask for mask in masks if mask is not None]
    if not found:
        return None
    full = torch.ones_like(found[0].real[:1])
    real = torch.cat([full if mask is None else mask.real for mask in masks])
    return PaddingMask(real, real, found[0].seq_first, found[0].of_signal)


def without_padding(sample: Any, encoder_decoder: bool, look: Look | None) -> tuple[Any, PaddingMask | None] | None:
    """Remove the padding at the ends of a sample of one sequence; other samples are left unchanged.

    Returns the sample and the mask of any padding left in it; None for a sample of nothing but padding.

    Args:
        sample: A batch of one sample.
        encoder_decoder: Whether the model is an encoder-decoder.
        look: Finds the masks that the model makes for a batch without an attention mask.

    >>> sample = {"input_ids": torch.tensor([[7, 8, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> without_padding(sample, False, None)[0]["input_ids"]
    tensor([[7, 8]])
    """
    named = isinstance(sample, Mapping) and isinstance(sample.get("attention_mask"), Tensor)
    if named or look is None or not _may_be_sequence(sample):
        sample = _trimmed_by_names(sample, encoder_decoder) if isinstance(sample, Mapping) else sample
        mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
        if isinstance(mask, Tensor) and not (mask.numel() and (mask.ndim != 2 or bool(mask.any()))):
            return None
        return sample, mask_named(sample)
    seen = look(sample)
    if seen is None:
        return (_trimmed_by_names(sample, encoder_decoder) if isinstance(sample, Mapping) else sample), None
    sides = [mask for mask in (seen.found.main, seen.found.ahead) if mask is not None]
    if not any(mask.has_padding for mask in sides):
        return sample, None
    if any(not mask.real.any() for mask in sides):
        return None
    trimmed = _trimmed_as_seen(sample, seen)
    if trimmed is not None and (mask := _still_seen(trimmed, seen, look)) is not False:
        return trimmed, mask
    return sample, seen.found.main if seen.found.main is not None and seen.found.main.has_padding else None


def _may_be_sequence(sample: Any) -> bool:
    """Whether a sample has a tensor that can be a sequence of tokens or features, not only images or lists."""
    return any(
        t.ndim >= 2 and t.shape[1] > 1 and (t.ndim == 2 or (t.ndim == 3 and t.is_floating_point()))
        for t in tensors_in(sample)
    )


def _trimmed_by_names(sample: Mapping[str, Any], encoder_decoder: bool) -> Mapping[str, Any]:
    """Trim a mapping by its masks. Labels of an encoder-decoder model are the decoder's, and are padded with -100."""
    trimmed = dict(sample)
    labels = sample.get("labels")
    if encoder_decoder and isinstance(labels, Tensor) and labels.ndim == 2 and "decoder_attention_mask" not in sample:
        real = until_last(labels != -100)
        trimmed["labels"] = labels[:, : int(real.sum())]
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = sample.get(key)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or _is_sound(sample, mask):
            continue
        start, end = _ends(mask)
        for name, value in sample.items():
            of_decoder = name.startswith("decoder_") or (encoder_decoder and name == "labels")
            same_side = of_decoder == key.startswith("decoder_")
            if same_side and isinstance(value, Tensor) and value.shape[:2] == mask.shape:
                trimmed[name] = value[:, start:end]
    return trimmed


def _is_sound(sample: Mapping[str, Any], mask: Tensor) -> bool:
    """Whether a mask is for audio frames, (batch, channels, frames), which models only take at a fixed length."""
    others = [value for value in sample.values() if isinstance(value, Tensor) and value is not mask]
    if any(other.shape[:2] == mask.shape for other in others):
        return False
    return any(other.ndim == 3 and other.shape[::2] == mask.shape for other in others)


def _ends(mask: Tensor) -> tuple[int, int]:
    real = mask[0].nonzero().squeeze(1)
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)


def _trimmed_as_seen(sample: Any, seen: MaskSeen) -> Any | None:
    """Trim the ends of a sample that the masks in a model's call exclude; None if it is unclear which of its tensors
    are sequences."""
    main, ahead = seen.found.main, seen.found.ahead
    spans = {id(mask): _ends(mask.real) for mask in (main, ahead) if mask is not None}
    sides: dict[int, PaddingMask | None] = {}
    for tensor in tensors_in(sample):
        fitting = [m for m in (main, ahead) if m is not None and tensor.ndim > 1 and tensor.shape[:2] == m.real.shape]
        names = [name for name, given in seen.given.items() if fitting and _same(given, tensor)]
        if len(fitting) > 1:
            of_decoder = {name.startswith(("decoder_", "tgt", "labels")) for name in names}
            fitting = [ahead if of_decoder.pop() else main] if len(of_decoder) == 1 else fitting
        if len(fitting) > 1 or (fitting and _is_doubtful(tensor, fitting[0], bool(names))):
            return None
        sides[id(tensor)] = fitting[0] if fitting else None
    leading = {id(sides[id(t)]) for t in tensors_in(sample) if not _is_mask(t, sides[id(t)])}
    sides = {key: side if id(side) in leading else None for key, side in sides.items()}  # not a mask alone
    if not any(side is not None for side in sides.values()):
        return None

    def trim(tensor: Tensor) -> Tensor:
        side = sides[id(tensor)]
        return tensor if side is None else tensor[:, slice(*spans[id(side)])]

    return map_tensors(trim, sample)


def _is_mask(tensor: Tensor, side: PaddingMask | None) -> bool:
    return side is None or _same(side.source, tensor)


def _is_doubtful(tensor: Tensor, mask: PaddingMask, is_given: bool) -> bool:
    """Whether a tensor as long as a mask may be something else: features, or a token-by-token matrix."""
    if tensor.ndim > 2:
        return mask.real.shape[1] in tensor.shape[2:]
    return tensor.is_floating_point() and not is_given


def _same(given: Tensor, tensor: Tensor) -> bool:
    return given.shape == tensor.shape and torch.equal(given.detach().to(tensor.device, tensor.dtype), tensor)


def _still_seen(trimmed: Any, before: MaskSeen, look: Look) -> PaddingMask | bool | None:
    """The mask that a model makes for a trimmed sample, None if none; False if it differs from that before trimming."""
    again = look(trimmed)
    if again is None:
        return None if _spared(before) else False
    for old, new in ((before.found.main, again.found.main), (before.found.ahead, again.found.ahead)):
        if old is None:
            continue
        expected = old.real[:, slice(*_ends(old.real))]
        if new is None:
            if not bool(expected.all()):
                return False
        elif not torch.equal(new.real, expected):
            return False
    mask = again.found.main
    return mask if mask is not None and mask.has_padding else None


def _spared(before: MaskSeen) -> bool:
    """Whether only the ends were padding, so that the model may need no mask for the trimmed sample."""
    sides = [mask for mask in (before.found.main, before.found.ahead) if mask is not None]
    return all(bool(mask.real[:, slice(*_ends(mask.real))].all()) for mask in sides)
