"""Perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefit.errors import DataError, SparsefitError

IGNORED = -100
"""The label of a token that is ignored in the loss, as in transformers."""


@torch.no_grad()
def perplexity(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], progress: Callable[[int], None] | None = None
) -> float:
    """exp of the mean next-token loss over all batches; losses are computed in float32 whatever the model's dtype.

    Each token except the first of its window counts once, as in the papers of SparseGPT and Wanda. The model is
    evaluated in evaluation mode; afterwards each module is back in its previous mode.

    Args:
        model: a causal language model of transformers, PEFT-wrapped or not; batches move to its device.
        batches: mappings with input_ids (batch, length), and optionally attention_mask and labels of that shape;
            labels of -100 and masked positions are ignored.
        progress: called with the number of batches done, after each of them.

    Raises:
        DataError: if there is no token to predict.
        SparsefitError: if a loss is not finite.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluation_mode(model):
        for number, batch in enumerate(batches, 1):
            batch = {key: value.to(device) for key, value in batch.items()}
            logits = model(**model_inputs(batch)).logits  # (batch, length, vocabulary)
            loss, tokens = next_token_loss(logits, labels_of(batch))
            if not math.isfinite(loss.item()):
                raise SparsefitError(
                    f"the loss of batch {number} is {loss.item()}: the model's outputs are not finite. Its weights may "
                    "be damaged, or float16 too narrow for it: evaluate in bfloat16 or float32"
                )
            total, count = total + loss.item(), count + int(tokens)
            if progress is not None:
                progress(number)
    if count == 0:
        raise DataError("there is no text to evaluate on: no batch holds a token to predict")
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the next-token losses, and the number of tokens in it.

    Args:
        logits: (batch, length, vocabulary), of any floating dtype.
        labels: (batch, length), the tokens at the same positions; -100 is ignored.

    Returns:
        The sum in float32 and the count in int64, both of shape ().
    """
    targets = labels[:, 1:].flatten()  # (batch * (length - 1),)
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's inputs without a loss: input_ids, and attention_mask if there is one."""
    return {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The batch's labels, or else its tokens with masked positions set to -100: (batch, length)."""
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" in batch:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch["input_ids"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; afterwards each module is back in its previous mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
