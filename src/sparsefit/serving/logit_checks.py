"""Compares an exported model's logits with the original's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsefit.errors import ExportError
from sparsefit.serving.decoders import Decoder, TorchDecoder
from sparsefit.serving.exported_graphs import Graph, sample_logits

_ALLOWED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest allowed difference of a logit, relative to the largest logit, by the dtype of both computations."""

_PROMPT, _STEPS = 12, 3


def decoder_difference(model: nn.Module, decoder: Decoder) -> float:
    """The largest logit difference relative to the largest logit, for two prompts and a few more tokens.

    Args:
        model: A decoder of transformers.
        decoder: The exported or converted decoder.
    """
    ids = prompts(model, 2, _PROMPT + _STEPS)
    original = TorchDecoder(model)
    largest = difference(decoder.start(ids[:, :_PROMPT]), original.start(ids[:, :_PROMPT]))
    for place in range(_PROMPT, _PROMPT + _STEPS):
        token = ids[:, place : place + 1]
        largest = max(largest, difference(decoder.step(token), original.step(token)))
    return largest


@torch.inference_mode()
def graph_difference(model: nn.Module, graph: Graph) -> float:
    """The largest logit difference of a model without a cache, relative to the largest logit."""
    return difference(sample_logits(graph), model(**graph.sample).logits)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value of the second.

    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    0.5
    """
    found, expected = found.float().cpu(), expected.float().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def check_difference(found: float, what: str, dtype: torch.dtype = torch.float32) -> None:
    """Check that logits agree up to rounding.

    Args:
        found: The largest logit difference, relative to the largest logit.
        what: The file or the runtime, for the message.
        dtype: The dtype of both computations: float32 for exported files, the model's for runtimes.

    Raises:
        ExportError: if they differ by more than rounding explains.
    """
    allowed = _ALLOWED.get(dtype, _ALLOWED[torch.float32])
    if not found <= allowed:  # NaN never passes
        raise ExportError(
            f"{what} does not compute what the model does, so it is not used: a logit differs by {found:.2%} of the "
            f"largest logit; rounding explains at most {allowed:.1%}"
        )


def prompts(model: nn.Module, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids (batch, length) of a language model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.get_text_config().vocab_size, (batch, length), generator=generator)
