"""Text that a causal language model writes itself: windows of tokens sampled from its own distribution."""

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
    """The transformers model inside a module that can write text; of a PEFT-wrapped one the model that it wraps.

    Raises:
        ConfigError: where there is none.
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
    """A digest of all weights of a model, bit by bit, of their names and of its configuration, adapters left out."""
    digest = hashlib.sha256()
    model = writer_in(module)
    for path, part in sorted(base_modules(model).items()):
        for name, weight in part.named_parameters(recurse=False):
            digest.update(f"{canonical_name(path)}.{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            whole = weight.detach().full_tensor() if is_sharded(weight) else weight.detach()
            digest.update(whole.cpu().contiguous().flatten().view(torch.uint8).numpy())
    told = {"transformers_version", "_name_or_path", "use_cache"}  # another release, folder or setting of training
    settings = {name: value for name, value in model.config.to_dict().items() if name not in told}
    digest.update(repr(sorted(settings.items(), key=lambda item: item[0])).encode())
    return digest.hexdigest()[:16]


def check_length(model: PreTrainedModel, length: int) -> None:
    """See that a model can write windows of so many tokens.

    Raises:
        ConfigError: where it has fewer positions.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < length:
        raise ConfigError(
            f"{type(model).__name__} has {most} positions, and is to write windows of {length} tokens: set a shorter "
            "sequence_length (and calibration_length)"
        )


@contextmanager
def writing(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The model that writes, in evaluation mode, without its adapters, and with sampling settings that are ours alone;
    all as it was afterwards, random numbers included."""
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
        for parameter in module.parameters():  # PEFT makes all that it disabled trainable
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        if (adapted := adapted_part(module)) is not None:
            stack.enter_context(adapted.disable_adapter())
        # What a model was published with (a temperature, a penalty of repetitions, tokens that end a text) would fill
        # in for whatever is left open below.
        stack.callback(setattr, model, "generation_config", model.generation_config)
        model.generation_config = GenerationConfig()
        module.eval()
        yield model


def sample_windows(
    model: PreTrainedModel, starts: Tensor, length: int, seed: int, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """Windows that a model writes from their first tokens on; inside `writing`.

    The token that ends a text ends no window: the model goes on as in the packed text of its training, where
    another text begins.

    Args:
        model: As `writing` gives it.
        starts: (windows, first tokens) int64.
        length: Tokens of a window, the first ones included.
        seed: Equal seeds, equal windows, on the same device.
        temperature: Logits are divided by it.
        top_p: Only the likeliest tokens that together have this probability are drawn.

    Returns:
        (windows, length) int64 on the CPU.

    Raises:
        CalibrationError: where the model gives no probabilities.
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
    """The `count` tokens that a model finds likeliest after a token, the likeliest first; inside `writing`."""
    logits = model(input_ids=torch.tensor([[start]], device=model.device)).logits[0, -1]  # (vocabulary,)
    return logits.float().topk(min(count, len(logits))).indices.tolist()
