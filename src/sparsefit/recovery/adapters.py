"""What is trained to recover a pruned model: adapters of several forms on a frozen base, or the kept weights."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from sparsefit.bare_model import canonical_name
from sparsefit.errors import ConfigError
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.pruning.heads import output_layers
from sparsefit.pruning.layers.experts import find_stacks
from sparsefit.recovery.model_kinds import task_type
from sparsefit.recovery.tuners import forbidden_targets
from sparsefit.settings import named_settings, number

if TYPE_CHECKING:
    from peft import PeftConfig

    from sparsefit.pruning import MaskSet

ALL_LINEAR = "all-linear"
Form = Literal["lora", "masked_lora", "hira", "full"]
_PARTS_OF_EXPERTS = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
LOSSLESS = ("masked_lora", "hira", "full")
"""The forms that merge into the sparse base without filling pruned weights."""


@named_settings
@dataclass
class AdapterSettings:
    """What is trained, and where. The defaults are those of the Wanda paper for the recovery of pruned models.

    Args:
        form: "lora": W + s B A (Hu et al. 2021, arXiv 2106.09685), not merged, as merging would fill pruned weights;
            "masked_lora": W + s M (.) (B A) (arXiv 2312.15230), which merges into the sparse base; "hira":
            W (.) (1 + B A) (Huang et al. 2025, HiRA), which merges, too; "full": the kept weights themselves.
        r: Rank of the adapters.
        alpha: The scale s is alpha / r. HiRA has no such scale.
        dropout: Dropout on the adapters' inputs during training.
        target_modules: Names of the linear layers to adapt (the last parts of their paths), or "all-linear" for all
            except the head.
        train_norms: Also train the weights of normalisation layers.
        train_biases: Also train all biases. PEFT's HiRA cannot.
        modules_to_save: Names of modules that are trained in full and saved with the adapter, such as a new head. PEFT
            adds the head of a text classifier (`classifier`, `score`) by itself.
    """

    form: Form = "lora"
    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: str | list[str] | tuple[str, ...] = ("q_proj", "v_proj")
    train_norms: bool = False
    train_biases: bool = False
    modules_to_save: list[str] | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in (*LOSSLESS, "lora"):
            raise ConfigError(
                f"unknown form of adapter {self.form!r}; the choices are lora, masked_lora, hira and full"
            )
        self.r = number("the rank r of the adapters", self.r, least=1, whole=True)
        self.alpha = number("alpha of the adapters", self.alpha, above=0)
        self.dropout = number("dropout of the adapters", self.dropout, least=0, below=1)
        if self.form == "hira" and self.train_biases:
            raise ConfigError("PEFT's HiRA trains no biases: leave out train_biases, or take form masked_lora")
        self.modules_to_save = _names("modules_to_save", self.modules_to_save)
        if self.target_modules != ALL_LINEAR:
            self.target_modules = _names("target_modules", self.target_modules)
            if not self.target_modules or not all(self.target_modules):
                raise ConfigError(f'there are no target_modules: name linear layers such as q_proj, or "{ALL_LINEAR}"')

    @property
    def lossless(self) -> bool:
        """Whether the form merges into the sparse base without filling pruned weights."""
        return self.form in LOSSLESS


def _names(setting: str, given: Any) -> tuple[str, ...]:
    """One name, or several, as a tuple."""
    names = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{setting} is {given!r}: it must be a name, or a list of names")
    return names


def attach_adapter(model: nn.Module, settings: AdapterSettings) -> nn.Module:
    """Make what the settings name trainable and freeze the rest. The outputs of the model do not change.

    Args:
        model: A transformers model or a plain module; changed in place.
        settings: Form, rank, scale, dropout and target modules.

    Returns:
        The model wrapped by PEFT; for form "full" the model itself.

    Raises:
        ConfigError: if the model has adapters already, or has no linear layer with a requested name.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigError("the model is PEFT-wrapped already: give it without `adapter`, or merge its adapters first")
    linears = _linear_layers(model)
    if settings.target_modules != ALL_LINEAR:
        _check_targets(settings.target_modules, linears)
    _check_modules(settings.modules_to_save, model)
    if settings.form == "full":
        _train_kept_weights(model, settings, linears)
        return model
    linears = _without_forbidden(model, settings, linears)
    norms = _norms(model) if settings.train_norms else {}
    _check_norms(norms, model)
    config = _peft_config(model, settings, linears, norms)
    if settings.form == "masked_lora" or (settings.form == "lora" and settings.dropout):
        _check_experts(config.target_modules, model)
    return get_peft_model(model, config)


def bind_masks(model: nn.Module, masks: MaskSet | None) -> None:
    """Give every masked adapter in a model the mask of its weight.

    Args:
        model: A LightningModule or model, with or without masked adapters.
        masks: Its masks; None removes the masks from all adapters.
    """
    for name, module in model.named_modules():
        if callable(take_mask := getattr(module, "take_mask", None)):
            weight = canonical_name(f"{name}.base_layer.weight")
            take_mask(masks[weight] if masks is not None and weight in masks else None)


def _peft_config(
    model: nn.Module, settings: AdapterSettings, linears: dict[str, nn.Module], norms: dict[str, nn.Module]
) -> PeftConfig:
    from peft import HiraConfig, LoraConfig

    # By path: PEFT's own "all-linear" includes routers, stacked experts and heads other than language model heads.
    everywhere = settings.target_modules == ALL_LINEAR
    targets = [*settings.target_modules]
    if everywhere:  # except modules that are trained in full
        saved = settings.modules_to_save
        targets = [path for path in _without_head(model, linears) if not _inside(path, saved)]
    common = {
        "task_type": task_type(model),
        "r": settings.r,
        "target_modules": targets,
        # GPT-2 keeps its matrices as (in, out)
        "fan_in_fan_out": any(_is_conv1d(layer) for layer in linears.values()),
        # PEFT trains copies of these and saves them with the adapter.
        "modules_to_save": [*norms, *settings.modules_to_save] or None,
    }
    if settings.form == "hira":
        return HiraConfig(hira_dropout=settings.dropout, **common)
    bias = "all" if settings.train_biases else "none"
    config = LoraConfig(lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias=bias, **common)
    if settings.form == "masked_lora":
        # PEFT's documented way to use custom layers (developer guide "Custom models").
        config._register_custom_module(masked_layer_types())
    return config


def masked_layer_types() -> dict[type[nn.Module], type[nn.Module]]:
    """The masked adapter class for each type of layer, in the form that PEFT expects."""
    from transformers.pytorch_utils import Conv1D

    from sparsefit.recovery.masked_lora import MaskedLoraConv1D, MaskedLoraLinear

    return {nn.Linear: MaskedLoraLinear, Conv1D: MaskedLoraConv1D}


def _train_kept_weights(model: nn.Module, settings: AdapterSettings, linears: dict[str, nn.Module]) -> None:
    if settings.target_modules == ALL_LINEAR:
        wanted = [linears[path].weight for path in _without_head(model, linears)]
        wanted += [stack for module in model.modules() for _, stack, _ in find_stacks(module)]  # stacked experts
    else:
        wanted = [layer.weight for path, layer in linears.items() if _is_target(path, settings.target_modules)]
    model.requires_grad_(False)
    for weight in wanted:
        weight.requires_grad_(True)
    for norm in _norms(model).values() if settings.train_norms else ():
        norm.requires_grad_(True)
    for path, module in model.named_modules():
        if _is_target(path, settings.modules_to_save):
            module.requires_grad_(True)
    for name, parameter in model.named_parameters() if settings.train_biases else ():
        if name.rpartition(".")[2] == "bias":
            parameter.requires_grad_(True)


def _without_head(model: nn.Module, linears: dict[str, nn.Module]) -> list[str]:
    """The paths of linear layers that do not belong to the model's head."""
    head = output_layers(model, [block for blocks in find_block_lists(model) for block in blocks])
    return [path for path in linears if f"{path}.weight" not in head]


def _without_forbidden(
    model: nn.Module, settings: AdapterSettings, linears: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The linear layers without those on which PEFT allows no adapters, such as Mamba's out_proj, whose weight is read
    by a kernel without calling the layer."""
    forbidden = forbidden_targets(model, {path.rpartition(".")[2] for path in linears})
    left = {path: layer for path, layer in linears.items() if path.rpartition(".")[2] not in forbidden}
    if settings.target_modules == ALL_LINEAR:
        if len(left) < len(linears):
            names = ", ".join(sorted(forbidden))
            warnings.warn(
                f"all-linear leaves out the {len(linears) - len(left)} layers named {names}: PEFT allows no adapters "
                f"on them in a model of type {model.config.model_type}",
                stacklevel=3,
            )
        return left
    for path in linears.keys() - left.keys():
        if _is_target(path, settings.target_modules):
            raise ConfigError(
                f"PEFT allows no adapters on {path} in a model of type {model.config.model_type}: leave "
                f"{path.rpartition('.')[2]!r} out of target_modules, or take form full"
            )
    return left


def _check_experts(targets: Iterable[str], model: nn.Module) -> None:
    """Raise if a target names a part of stacked experts: PEFT would adapt the stack by plain LoRA without dropout or
    mask."""
    if not any(find_stacks(module) for module in model.modules()):
        return
    for target in targets:
        if target.rpartition(".")[2] in _PARTS_OF_EXPERTS:
            raise ConfigError(
                f"PEFT takes the target module {target!r} for a part of the stacked experts, whose adapters support "
                "neither masks nor dropout: name other layers, such as the attention's, or take form hira or full"
            )


def _check_norms(norms: dict[str, nn.Module], model: nn.Module) -> None:
    for path, _ in model.named_modules():
        if path not in norms and norms and path.endswith(tuple(norms)):
            norm = next(name for name in norms if path.endswith(name))
            raise ConfigError(
                f"train_norms would train {path}, too: PEFT knows modules by the end of their path, and that is as "
                f"that of the normalisation layer {norm}. Leave out train_norms, or give the layer another name"
            )


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Normalisation layers by path: leaf modules with only 1-D weights and "norm" in their class name."""
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


def _inside(path: str, names: Sequence[str]) -> bool:
    """Whether a module or one of its ancestors has one of the names."""
    parts = path.split(".")
    return any(_is_target(".".join(parts[:end]), names) for end in range(1, len(parts) + 1))


def _check_targets(targets: Iterable[str], linears: Iterable[str]) -> None:
    paths = list(linears)
    names = sorted({path.rpartition(".")[2] for path in paths})
    for target in targets:
        if any(_is_target(path, [target]) for path in paths):
            continue
        near = difflib.get_close_matches(target, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"its linear layers are {', '.join(names) or 'none'}"
        raise ConfigError(f"the target module {target!r} is no linear layer of the model: {hint}")


def _check_modules(names: Iterable[str], model: nn.Module) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if not any(_is_target(path, [name]) for path in paths):
            near = difflib.get_close_matches(name, {path.rpartition(".")[2] for path in paths}, n=3, cutoff=0.5)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"modules_to_save names {name!r}, which is not a module of the model{hint}")
