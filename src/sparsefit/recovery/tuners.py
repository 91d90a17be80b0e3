"""PEFT tuners on a base that is pruned under them: which are refused, and how the configurations of the rest are saved.

Tuners are judged by a trial on a layer of the same kind, not by name, so new tuners follow the same rules. See
docs/adapters.md for the results with current tuners.
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
from sparsefit.recovery.tuner_trials import INITIALIZED, fixed_seed, has_named_initialization, set_values, try_reload

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from sparsefit.pruning import PruningConfig

_LEFT = "The model was left as it was."
_FIRST = "Prune it first, without the adapter, and make the adapter on the pruned model, which stays frozen and sparse"
_TOLD_AT_EACH_CALL = ("PREFIX_TUNING", "CARTRIDGE", "POLY")  # they get keys and values, or the task id, at each call


def check_tuners(model: nn.Module, pruning: PruningConfig) -> None:
    """Check that the base under a model's adapters can be pruned, and that the adapters can be reloaded afterwards.

    Args:
        model: A dense LightningModule or model, with or without adapters. It is not changed.
        pruning: The pruning configuration.

    Raises:
        ConfigError: if not; names the tuner and what to do instead.
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
    """The names of linear layers that PEFT refuses to adapt in a model of this type, by a trial for each name.

    The trial always uses AdaLoRA. The refused layers are those whose weight the model reads without calling the layer,
    so the kind of adapter does not matter, and for LoRA PEFT also treats some names as experts.
    """
    from peft import AdaLoraConfig, get_peft_model

    forbidden = set()
    if not hasattr(model, "config"):
        return forbidden
    with fixed_seed(), warnings.catch_warnings():
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
def saved_as_initialized(model: PeftModel) -> Iterator[None]:
    """Mark the adapters in a model's configurations as initialized while these are saved.

    PiSSA, OLoRA, CorDA, LoftQ and similar initializations change the base when the adapter is created. The saved base
    includes this change, and PEFT would apply it again if the saved configuration named the initialization.
    """
    configs = [config for config in model.peft_config.values() if has_named_initialization(config)]
    before = [{key: getattr(config, key) for key in INITIALIZED if hasattr(config, key)} for config in configs]
    try:
        for config, kept in zip(configs, before, strict=True):
            set_values(config, {key: INITIALIZED[key] for key in kept})
        yield
    finally:
        for config, kept in zip(configs, before, strict=True):
            set_values(config, kept)


def _check_names(part: PeftModel) -> None:
    """Raise if a PEFT module that does not wrap a layer holds weights of the base: their names would differ from those
    in the bare model."""
    config = next(iter(part.peft_config.values()))
    base = part.get_base_model()
    strays = [name for name, module in base_modules(base).items() if type(module).__module__.startswith("peft.")]
    if not config.is_prompt_learning:  # a prompt does not wrap the base; `exported_masks` maps the names
        names = {canonical_name(name) for name, _ in part.named_parameters()}
        strays += [name for name, _ in base.named_parameters() if canonical_name(name) not in names]
    if strays:
        raise ConfigError(
            f"{_title(config)} gives weights of the model other names ({strays[0]}, ...), so that what is written of "
            f"them would not fit. {_LEFT} {_FIRST}"
        )


def _check_order(config: PeftConfig, pruning: PruningConfig) -> None:
    """Raise if an adapter needs inputs at each call of the model, which it does not get when blocks run one by one."""
    told = config.peft_type.value in _TOLD_AT_EACH_CALL or getattr(config, "alora_invocation_tokens", None)
    if told and pruning.needs_inputs and pruning.update != "none":
        raise ConfigError(
            f"{_title(config)} passes inputs of its own to its layers at each call of the model, which are missing "
            f"when blocks run one by one. {_LEFT} Prune in one pass, with update='none', or prune first, without "
            "the adapter"
        )


def _one_of_each_kind(part: nn.Module, adapter: str) -> list[nn.Module]:
    """The smallest layer of each class of layers with the adapter; layers without matrices are left out."""
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
    except Exception as error:  # PEFT may reject a model of one layer for any reason
        warnings.warn(
            f"It could not be tried out whether {_title(config)} can be reloaded on a pruned base ({error}): "
            "compare the model with the reloaded one before you rely on it",
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
