"""LoRA adapters on a frozen model (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sparsefit.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"


@dataclass
class LoraSettings:
    """LoRA as the paper of Wanda recovers pruned models with it.

    Args:
        r: rank of the adapters.
        alpha: their outputs are scaled by alpha / r.
        dropout: of the adapters' inputs while training.
        target_modules: names of the linear layers that get an adapter (the last parts of their paths), or
            "all-linear" for all of them but the head.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: str | list[str] | tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"the rank r of LoRA is {self.r!r}: it must be a whole number of at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"alpha of LoRA is {self.alpha!r}: it must be above 0, or the adapters do nothing")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of LoRA is {self.dropout!r}: it must be at least 0 and below 1")
        if self.target_modules != ALL_LINEAR:
            names = [self.target_modules] if isinstance(self.target_modules, str) else list(self.target_modules)
            if not names or not all(names):
                raise ConfigError(f'LoRA has no target_modules: name linear layers such as q_proj, or "{ALL_LINEAR}"')
            self.target_modules = tuple(names)


def attach_lora(model: nn.Module, settings: LoraSettings) -> PeftModel:
    """Wrap a model with LoRA adapters that change nothing yet; the adapters train, all else is frozen.

    Args:
        model: of transformers, or a plain module; it is changed in place.
        settings: rank, scale, dropout and places of the adapters.

    Raises:
        ConfigError: where the model has adapters already, or no linear layer of a wanted name.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigError("the model is PEFT-wrapped already: give it without `lora`, or merge its adapters first")
    linears = _linear_layers(model)
    if settings.target_modules != ALL_LINEAR:
        _check_targets(settings.target_modules, linears)
    config = LoraConfig(
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules if settings.target_modules == ALL_LINEAR else [*settings.target_modules],
        # GPT-2 keeps its matrices as (in, out)
        fan_in_fan_out=any(type(layer).__name__ == "Conv1D" for layer in linears.values()),
        bias="none",
    )
    return get_peft_model(model, config)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def _check_targets(targets: Iterable[str], linears: Iterable[str]) -> None:
    paths = list(linears)
    names = sorted({path.rpartition(".")[2] for path in paths})
    for target in targets:
        if any(path == target or path.endswith(f".{target}") for path in paths):
            continue
        near = difflib.get_close_matches(target, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"its linear layers are {', '.join(names) or 'none'}"
        raise ConfigError(f"LoRA's target module {target!r} is no linear layer of the model: {hint}")
