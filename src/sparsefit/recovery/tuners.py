"""PEFT's tuners on a base that is pruned under them: which are refused, and how the others are written.

What a tuner does is found out by trying it on a layer of its own kind, not by its name, so that tuners to come are
judged by the same rules: see docs/adapters.md for what that gives on those of today.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sparsefit.bare_model import base_modules, canonical_name
from sparsefit.errors import ConfigError
from sparsefit.recovery.gather_shards import has_shards, whole
from sparsefit.recovery.tuner_trials import BEGUN, begins_in_its_own_way, own_randomness, set_values, try_reload

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from sparsefit.pruning import PruningConfig

_LEFT = "The model was left as it was."
_FIRST = "Prune it first, without the adapter, and make the adapter on the pruned model, which stays frozen and sparse"
_TOLD_AT_EACH_CALL = ("PREFIX_TUNING", "CARTRIDGE", "POLY")  # keys and values; the task


def check_tuners(model: nn.Module, pruning: PruningConfig) -> None:
    """See that the base under the adapters in a model can be pruned, and that they can be read from files then.

    Args:
        model: A LightningModule or model, dense, with or without adapters. It stays as it is.
        pruning: How it shall be pruned.

    Raises:
        ConfigError: if not; names the tuner and the way out.
    """
    part = next((part for part in model.modules() if hasattr(part, "peft_config")), None)
    if part is not None:
        if not callable(getattr(part, "get_base_model", None)):
            raise ConfigError(
                f"the adapters in {type(part).__name__} cannot be written apart from their base, which PEFT does for a "
                f"PeftModel alone. {_LEFT} Put them on with peft.get_peft_model(model, config)"
            )
        _check_names(part)
        for adapter, config in part.peft_config.items():
            _check_order(config, pruning)
            for layer in _one_of_each_kind(part, adapter):
                _check_reload(config, layer)


def forbidden_targets(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Which names of linear layers PEFT refuses in a model of this type: asked on a layer of that name alone.

    AdaLoRA is asked, whatever the adapter: where a model reads a weight past its layer no adapter is seen, and of LoRA
    PEFT has opinions on names of experts, too.
    """
    from peft import AdaLoraConfig, get_peft_model

    forbidden = set()
    if not hasattr(model, "config"):
        return forbidden
    with own_randomness(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            trial = nn.ModuleDict({name: nn.Linear(1, 1)})
            trial.config = model.config
            try:
                get_peft_model(trial, AdaLoraConfig(init_r=1, tinit=1, tfinal=1, total_step=9, target_modules=[name]))
            except ValueError:
                forbidden.add(name)
    return forbidden


@contextmanager
def begun(model: PeftModel) -> Iterator[None]:
    """The configurations of a model's adapters as they are written: of LoRA that it has begun.

    PiSSA, OLoRA, CorDA, LoftQ and their like change the base as they are made. The base on disk has been changed, and
    PEFT, which reads how an adapter began, would change it once more.
    """
    configs = [config for config in model.peft_config.values() if begins_in_its_own_way(config)]
    before = [{key: getattr(config, key) for key in BEGUN if hasattr(config, key)} for config in configs]
    try:
        for config, kept in zip(configs, before, strict=True):
            set_values(config, {key: BEGUN[key] for key in kept})
        yield
    finally:
        for config, kept in zip(configs, before, strict=True):
            set_values(config, kept)


def _check_names(part: PeftModel) -> None:
    """A module of PEFT's that is no layer on another one must not hold weights of the base: they have other names there
    than in the bare model."""
    config = next(iter(part.peft_config.values()))
    base = part.get_base_model()
    strays = [name for name, module in base_modules(base).items() if type(module).__module__.startswith("peft.")]
    if not config.is_prompt_learning:  # a prompt stands beside the base: `exported_masks` knows the names under it
        names = {canonical_name(name) for name, _ in part.named_parameters()}
        strays += [name for name, _ in base.named_parameters() if canonical_name(name) not in names]
    if strays:
        raise ConfigError(
            f"{_title(config)} gives weights of the model other names ({strays[0]}, ...), so that what is written of "
            f"them would not fit. {_LEFT} {_FIRST}"
        )


def _check_order(config: PeftConfig, pruning: PruningConfig) -> None:
    """What the adapter is told at each call of the model it is not told where blocks are run one by one."""
    told = config.peft_type.value in _TOLD_AT_EACH_CALL or getattr(config, "alora_invocation_tokens", None)
    if told and pruning.needs_inputs and pruning.update != "none":
        raise ConfigError(
            f"{_title(config)} gives its layers something of its own at each call of the model, which they would lack "
            f"where blocks are run one by one. {_LEFT} Prune in one pass, with update='none', or prune first, without "
            "the adapter"
        )


def _one_of_each_kind(part: nn.Module, adapter: str) -> list[nn.Module]:
    """Of each class of layers that hold the adapter one of the smallest; layers without matrices are left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[tuple[type, type], nn.Module] = {}
    for layer in part.modules():
        if not isinstance(layer, BaseTunerLayer) or not any(
            adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names
        ):
            continue
        base = layer.get_base_layer()
        kind = type(layer), type(base)
        weight = getattr(base, "weight", None)
        if isinstance(base, nn.Embedding) or not isinstance(weight, Tensor) or weight.ndim < 2:
            continue
        if kind not in found or weight.numel() < found[kind].get_base_layer().weight.numel():
            found[kind] = layer
    return list(found.values())


def _check_reload(config: PeftConfig, layer: nn.Module) -> None:
    base = layer.get_base_layer()
    if has_shards(base):
        with whole(base):
            base = copy.deepcopy(base)
    try:
        difference, changes_base = try_reload(config, base)
    except Exception as error:  # whatever PEFT does not like about a model of one layer
        warnings.warn(
            f"It could not be tried out whether {_title(config)} comes back from its files on a pruned base ({error}): "
            "compare the model with what is read again before you rely on it",
            stacklevel=2,
        )
        return
    if difference == 0:
        return
    if changes_base:
        raise ConfigError(
            f"{_title(config)} changes the weights under it as it is made, and would do so again with the pruned ones "
            f"whenever it is read. {_LEFT} Take LoRA with init_lora_weights=True and without such settings, or form "
            "masked_lora"
        )
    raise ConfigError(
        f"{_title(config)} is made from the weights under it, and what it takes from them is not in its files: read "
        f"again on the pruned base it would be another adapter. {_LEFT} {_FIRST}"
    )


def _title(config: PeftConfig) -> str:
    return f"PEFT's {type(config).__name__.removesuffix('Config')}"
