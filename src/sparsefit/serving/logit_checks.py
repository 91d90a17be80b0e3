"""An exported model against the one that it was made from: the same inputs, the same logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsefit.errors import ExportError
from sparsefit.serving.decoders import Decoder, TorchDecoder
from sparsefit.serving.exported_graphs import Graph, sample_logits

_ALLOWED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest difference of a logit, as a share of the largest logit, by the dtype that both sides compute in."""

_PROMPT, _STEPS = 12, 3


def decoder_difference(model: nn.Module, decoder: Decoder) -> float:
    """The largest difference of a logit as a share of the largest one: two prompts read, then a few tokens.

    Args:
        model: A decoder of transformers.
        decoder: What was made of it.
    """
    ids = prompts(model, 2, _PROMPT + _STEPS)
    ours = TorchDecoder(model)
    largest = difference(decoder.start(ids[:, :_PROMPT]), ours.start(ids[:, :_PROMPT]))
    for place in range(_PROMPT, _PROMPT + _STEPS):
        token = ids[:, place : place + 1]
        largest = max(largest, difference(decoder.step(token), ours.step(token)))
    return largest


@torch.inference_mode()
def graph_difference(model: nn.Module, graph: Graph) -> float:
    """The same of a model that reads its inputs once."""
    return difference(sample_logits(graph), model(**graph.sample).logits)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors as a share of the largest value of the second.

    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    0.5
    """
    found, expected = found.float().cpu(), expected.float().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def check_difference(found: float, what: str, dtype: torch.dtype = torch.float32) -> None:
    """See that an exported or converted model computes what the model does.

    Args:
        found: The largest difference of a logit as a share of the largest one.
        what: The file or the runtime, for the message.
        dtype: What both compute in. Exported files are checked in float32, runtimes in the dtype that they run.

    Raises:
        ExportError: if it does not, beyond what rounding in its dtype explains.
    """
    allowed = _ALLOWED.get(dtype, _ALLOWED[torch.float32])
    if not found <= allowed:  # NaN is no difference that is allowed
        raise ExportError(
            f"{what} does not compute what the model does, so it is not used: a logit differs by {found:.2%} of the "
            f"largest, and rounding explains {allowed:.1%}"
        )


def prompts(model: nn.Module, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids (batch, length) of a language model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.get_text_config().vocab_size, (batch, length), generator=generator)
