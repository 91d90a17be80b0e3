"""What recovers a pruned model: adapters of several forms on a frozen base, or the kept weights themselves."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from sparsefit.errors import ConfigError
from sparsefit.pruning.naming import canonical_name

if TYPE_CHECKING:
    from peft import PeftConfig

    from sparsefit.pruning import MaskSet

ALL_LINEAR = "all-linear"
Form = Literal["lora", "masked_lora", "hira", "full"]
LOSSLESS = ("masked_lora", "hira", "full")
"""The forms that merge into the sparse base without bringing a weight back."""


@dataclass
class AdapterSettings:
    """What is trained, and where. The defaults are those by which the paper of Wanda recovers pruned models.

    Args:
        form: "lora": W + s B A (Hu et al. 2021, arXiv 2106.09685), kept apart, as merging would bring pruned weights
            back; "masked_lora": W + s M (.) (B A) (arXiv 2312.15230), which merges into the sparse base; "hira":
            W (.) (1 + B A) (Huang et al. 2025, HiRA), which does, too; "full": the kept weights themselves.
        r: rank of the adapters.
        alpha: s is alpha / r. HiRA has no such scale.
        dropout: of the adapters' inputs while training.
        target_modules: names of the linear layers that are adapted (the last parts of their paths), or
            "all-linear" for all of them but the head.
        train_norms: train the weights of normalisation layers, too.
        train_biases: train all biases, too. PEFT's HiRA cannot.
    """

    form: Form = "lora"
    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: str | list[str] | tuple[str, ...] = ("q_proj", "v_proj")
    train_norms: bool = False
    train_biases: bool = False

    def __post_init__(self) -> None:
        if self.form not in (*LOSSLESS, "lora"):
            raise ConfigError(
                f"unknown form of adapter {self.form!r}; the choices are lora, masked_lora, hira and full"
            )
        if not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"the rank r of the adapters is {self.r!r}: it must be a whole number of at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"alpha of the adapters is {self.alpha!r}: it must be above 0, or they do nothing")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of the adapters is {self.dropout!r}: it must be at least 0 and below 1")
        if self.form == "hira" and self.train_biases:
            raise ConfigError("PEFT's HiRA trains no biases: leave out train_biases, or take form masked_lora")
        if self.target_modules != ALL_LINEAR:
            names = [self.target_modules] if isinstance(self.target_modules, str) else list(self.target_modules)
            if not names or not all(names):
                raise ConfigError(f'there are no target_modules: name linear layers such as q_proj, or "{ALL_LINEAR}"')
            self.target_modules = tuple(names)

    @property
    def lossless(self) -> bool:
        """Whether what is trained merges into the sparse base without bringing a weight back."""
        return self.form in LOSSLESS


def attach_adapter(model: nn.Module, settings: AdapterSettings) -> nn.Module:
    """Make what the settings name trainable, and freeze the rest; what is added changes nothing yet.

    Args:
        model: of transformers, or a plain module; it is changed in place.
        settings: form, rank, scale, dropout and places.

    Returns:
        The model wrapped by PEFT; for form "full" the model itself.

    Raises:
        ConfigError: where the model has adapters already, or no linear layer of a wanted name.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigError("the model is PEFT-wrapped already: give it without `adapter`, or merge its adapters first")
    linears = _linear_layers(model)
    if settings.target_modules != ALL_LINEAR:
        _check_targets(settings.target_modules, linears)
    if settings.form == "full":
        _train_kept_weights(model, settings, linears)
        return model
    norms = _norms(model) if settings.train_norms else {}
    return get_peft_model(model, _peft_config(model, settings, linears, norms))


def bind_masks(model: nn.Module, masks: MaskSet | None) -> None:
    """Give every masked adapter in a model the mask of its weight; None takes all masks away.

    Args:
        model: A LightningModule or model, with or without such adapters.
        masks: Its masks.
    """
    for name, module in model.named_modules():
        if callable(take_mask := getattr(module, "take_mask", None)):
            weight = canonical_name(f"{name}.base_layer.weight")
            take_mask(masks[weight] if masks is not None and weight in masks else None)


def _peft_config(
    model: nn.Module, settings: AdapterSettings, linears: dict[str, nn.Module], norms: dict[str, nn.Module]
) -> PeftConfig:
    from peft import HiraConfig, LoraConfig

    everywhere = settings.target_modules == ALL_LINEAR
    common = {
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "r": settings.r,
        "target_modules": ALL_LINEAR if everywhere else [*settings.target_modules],
        # GPT-2 keeps its matrices as (in, out)
        "fan_in_fan_out": any(_is_conv1d(layer) for layer in linears.values()),
        # PEFT trains copies of these and saves them with the adapter.
        "modules_to_save": [*norms] or None,
    }
    if settings.form == "hira":
        return HiraConfig(hira_dropout=settings.dropout, **common)
    bias = "all" if settings.train_biases else "none"
    config = LoraConfig(lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias=bias, **common)
    if settings.form == "masked_lora":
        from transformers.pytorch_utils import Conv1D

        from sparsefit.recovery.masked_lora import MaskedLoraConv1D, MaskedLoraLinear

        # PEFT's documented way to bring layers of one's own (developer guide "Custom models").
        config._register_custom_module({nn.Linear: MaskedLoraLinear, Conv1D: MaskedLoraConv1D})
    return config


def _train_kept_weights(model: nn.Module, settings: AdapterSettings, linears: dict[str, nn.Module]) -> None:
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    targets = settings.target_modules
    wanted = [
        layer
        for path, layer in linears.items()
        if (layer is not head if targets == ALL_LINEAR else _is_target(path, targets))
    ]
    model.requires_grad_(False)
    for layer in wanted:
        layer.weight.requires_grad_(True)
    for norm in _norms(model).values() if settings.train_norms else ():
        norm.requires_grad_(True)
    for name, parameter in model.named_parameters() if settings.train_biases else ():
        if name.rpartition(".")[2] == "bias":
            parameter.requires_grad_(True)


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Normalisation layers, by path: what has weights of one dimension only and "norm" in its class's name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and (own := [*module.parameters()])
        and all(parameter.ndim == 1 for parameter in own)
        and not [*module.children()]
    }


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)
    }


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _is_target(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _check_targets(targets: Iterable[str], linears: Iterable[str]) -> None:
    paths = list(linears)
    names = sorted({path.rpartition(".")[2] for path in paths})
    for target in targets:
        if any(_is_target(path, [target]) for path in paths):
            continue
        near = difflib.get_close_matches(target, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"its linear layers are {', '.join(names) or 'none'}"
        raise ConfigError(f"the target module {target!r} is no linear layer of the model: {hint}")
