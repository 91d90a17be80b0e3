"""The predictions in the output of a model: its logits, and the seeds of labels drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsefit.calibration.batches import digest
from sparsefit.calibration.samples import tensors_in
from sparsefit.errors import ConfigError

TARGETS = ("labels", "label", "label_ids", "target", "targets")


def logits_of(output: Any, mask: Tensor | None = None, sample: Any = None) -> Tensor:
    """The logits in the output of a model, (predictions, classes) float32: its `logits`, (batch, classes) or (batch,
    positions, classes), or the output itself, (batch, classes), or the logarithm of that, if it holds probabilities. A
    tensor of three dimensions may be hidden states or embeddings, and is not taken for logits.

    Args:
        output: What the model returned.
        mask: Which positions of the inputs count, (batch, positions) bool; None if all do.
        sample: The inputs. Those of a decoder with an encoder say themselves which of its positions count.

    Raises:
        ConfigError: if there are none, or they have no gradient.

    >>> logits_of({"logits": torch.zeros(2, 3, 5, requires_grad=True)}).shape
    torch.Size([6, 5])
    """
    found = _part(output, "logits")
    plain = found is None and isinstance(output, Tensor) and output.ndim == 2
    found = output if plain else found
    is_logits = isinstance(found, Tensor) and found.ndim in (2, 3) and found.is_floating_point() and found.shape[-1] > 1
    if not is_logits or not found.requires_grad:
        shape = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        shape += f" with logits {tuple(found.shape)}" if isinstance(found, Tensor) and found is not output else ""
        raise ConfigError(
            "allocation 'fisher' needs the logits of the model's predictions, with a gradient: `logits`, (batch, "
            "classes) or (batch, positions, classes), in the model's output, or a tensor (batch, classes), of two or "
            f"more classes. Calibration runs the model and gets {shape}{' without a gradient' if is_logits else ''}: "
            "use allocation 'owl', or run the model so that it returns logits (a LightningModule by a "
            "calibration_step(batch))"
        )
    if _part(output, "encoder_last_hidden_state") is not None:  # the mask is that of the encoder's inputs
        mask = _counted_by_decoder(sample)
    counted = found[mask.to(found.device)] if mask is not None and mask.shape == found.shape[:-1] else found
    logits = counted.float().flatten(0, -2)
    return logits.clamp_min(torch.finfo(torch.float32).tiny).log() if plain and _are_probabilities(logits) else logits


def labels_seed(sample: Any) -> int:
    """The seed with which the labels of a sample are drawn: the same in every order of the data, on every rank, with or
    without targets, and another one for another sample.

    >>> inputs = torch.ones(1, 2)
    >>> labels_seed({"labels": torch.zeros(1), "input_ids": inputs}) == labels_seed({"input_ids": inputs})
    True
    """
    if isinstance(sample, Mapping):
        sample = {name: value for name, value in sample.items() if not name.endswith((*TARGETS, "mask"))} or sample
    return int(digest(next(tensors_in(sample), None))[:15], 16)


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _are_probabilities(rows: Tensor) -> bool:
    return bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() < 1e-3).all())


def _counted_by_decoder(sample: Any) -> Tensor | None:
    """Which positions of a decoder's inputs count, as far as a sample says it."""
    given = sample if isinstance(sample, Mapping) else {}
    mask, labels = given.get("decoder_attention_mask"), given.get("labels")
    return mask.bool() if mask is not None else labels != -100 if isinstance(labels, Tensor) else None
