"""Sampling windows of tokens from a causal language model's own distribution."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from sparsefit.bare_model import base_modules, canonical_name
from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.recovery.export import adapted_part, pretrained_part
from sparsefit.recovery.gather_shards import has_shards
from sparsefit.sharded import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def writer_in(module: nn.Module) -> PreTrainedModel:
    """The transformers model inside a module that can generate text; without the PEFT wrapper, if it has one.

    Raises:
        ConfigError: if there is none.
    """
    found = pretrained_part(module)
    model = found[1] if found is not None else module
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(model).__name__} cannot write its own text: that takes a causal language model of transformers, "
            "made in __init__, whose `generate` continues a text. Name sources of real text instead "
            "(train_source, calibration_source)"
        )
    return model


def weights_digest(module: nn.Module) -> str:
    """A digest of the exact values and names of all weights of a model, and of its configuration; without adapters."""
    digest = hashlib.sha256()
    model = writer_in(module)
    for path, part in sorted(base_modules(model).items()):
        for name, weight in part.named_parameters(recurse=False):
            digest.update(f"{canonical_name(path)}.{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            whole = weight.detach().full_tensor() if is_sharded(weight) else weight.detach()
            digest.update(whole.cpu().contiguous().flatten().view(torch.uint8).numpy())
    told = {"transformers_version", "_name_or_path", "use_cache"}  # these do not change what the model computes
    settings = {name: value for name, value in model.config.to_dict().items() if name not in told}
    digest.update(repr(sorted(settings.items(), key=lambda item: item[0])).encode())
    return digest.hexdigest()[:16]


def check_length(model: PreTrainedModel, length: int) -> None:
    """Check that a model can generate windows of `length` tokens.

    Raises:
        ConfigError: if it has fewer positions.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < length:
        raise ConfigError(
            f"{type(model).__name__} has {most} positions, and is to write windows of {length} tokens: set a shorter "
            "sequence_length (and calibration_length)"
        )


@contextmanager
def writing(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the generating model, in evaluation mode, without its adapters and its own generation settings. Everything
    is restored afterwards, including the state of the random number generators."""
    from transformers import GenerationConfig

    model = writer_in(module)
    if has_shards(module):
        raise ConfigError(
            "a model that is split over devices does not write text: let one device (or strategy ddp) write it first, "
            "by a fit with max_steps=0 or `write_with(model)`; this run will find its file in the same folder"
        )
    with ExitStack() as stack, isolate_rng(), torch.no_grad():
        for part in (part for part in module.modules() if part.training):
            stack.callback(setattr, part, "training", True)
        for parameter in module.parameters():  # PEFT makes the adapters that it disabled trainable again
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        if (adapted := adapted_part(module)) is not None:
            stack.enter_context(adapted.disable_adapter())
        # The model's published generation settings (temperature, repetition penalty, end tokens) would otherwise apply
        # wherever `sample_windows` sets nothing.
        stack.callback(setattr, model, "generation_config", model.generation_config)
        model.generation_config = GenerationConfig()
        module.eval()
        yield model


def sample_windows(
    model: PreTrainedModel, starts: Tensor, length: int, seed: int, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """Continue the first tokens of windows with sampled tokens. Call this inside `writing`.

    An end-of-text token does not end a window: the model goes on with another text, as in packed training text.

    Args:
        model: The model that `writing` yields.
        starts: The first tokens of each window, (windows, first tokens) int64.
        length: Tokens of a window, including the first ones.
        seed: The same seed gives the same windows on the same device.
        temperature: Logits are divided by it.
        top_p: Sample only from the most likely tokens whose probabilities add up to this.

    Returns:
        (windows, length) int64 on the CPU.

    Raises:
        CalibrationError: if the model's probabilities are not finite.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        use_cache=True,
        max_new_tokens=length - starts.shape[1],
    )
    starts = starts.to(model.device)
    torch.manual_seed(seed)
    try:
        written = model.generate(starts, attention_mask=torch.ones_like(starts), generation_config=settings)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise CalibrationError(
            "the model's probabilities of the next token are not finite, so it cannot write its own text: check its "
            "weights, or load it in bfloat16 or float32"
        ) from error
    return written.cpu()


def likely_tokens(model: PreTrainedModel, start: int, count: int) -> list[int]:
    """The `count` most likely tokens after a token, the most likely first. Call this inside `writing`."""
    logits = model(input_ids=torch.tensor([[start]], device=model.device)).logits[0, -1]  # (vocabulary,)
    return logits.float().topk(min(count, len(logits))).indices.tolist()
