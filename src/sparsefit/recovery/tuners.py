"""PEFT's tuners on a base that is pruned under them: which come back from their files, and which merge with no zero lost.

What a tuner does is found out by trying it on a layer of its own kind, not by its name, so that tuners to come are
judged by the same rules: see docs/adapters.md for what that gives on those of today.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsefit.errors import ConfigError
from sparsefit.pruning.naming import base_modules, canonical_name

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from sparsefit.pruning import PruningConfig

_NAME = "probe"
_PLACES = {  # where adapters go; the trial has one layer
    "target_modules": [_NAME],
    "feedforward_modules": [],
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "task_type": None,
}
_LEFT = "The model was left as it was."
_FIRST = (
    "Prune it first, without the adapter, and make the adapter on the pruned model, whose weights stay frozen and sparse"
)
_TOLD_AT_EACH_CALL = ("PREFIX_TUNING", "CARTRIDGE", "POLY")  # keys and values; the task
_BEGUN = {  # how an adapter begins, by which nothing in its file goes
    "init_lora_weights": True,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}


def check_tuners(model: nn.Module, pruning: PruningConfig) -> None:
    """See that the base under the adapters in a model can be pruned, and that they can be read from files then.

    Args:
        model: A LightningModule or model, dense, with or without adapters. It stays as it is.
        pruning: How it shall be pruned.

    Raises:
        ConfigError: if not; names the tuner and the way out.
    """
    for part in [part for part in model.modules() if hasattr(part, "peft_config")]:
        if not callable(getattr(part, "get_base_model", None)):
            continue  # adapters without a PeftModel around them, which their owner saves
        _check_names(part)
        for adapter, config in part.peft_config.items():
            _check_order(config, pruning)
            for layer in _one_of_each_kind(part, adapter):
                _check_reload(config, layer)


@contextmanager
def begun(model: PeftModel) -> Iterator[None]:
    """The configurations of a model's adapters as they are written: of LoRA that it has begun.

    PiSSA, OLoRA, CorDA, LoftQ and their like change the base as they are made. The base on disk has been changed, and
    PEFT, which reads how an adapter began, would change it once more.
    """
    configs = [config for config in model.peft_config.values() if _begins_in_its_own_way(config)]
    before = [{key: getattr(config, key) for key in _BEGUN if hasattr(config, key)} for config in configs]
    try:
        for config, kept in zip(configs, before, strict=True):
            _set(config, {key: _BEGUN[key] for key in kept})
        yield
    finally:
        for config, kept in zip(configs, before, strict=True):
            _set(config, kept)


@torch.no_grad()
def fills_zeros(layer: nn.Module) -> bool:
    """Whether merging what such an adapter may become writes into zeros of its weights; True if it cannot be merged.

    Args:
        layer: A layer of PEFT on a pruned weight; it stays as it is, and a copy of it is merged.
    """
    with _own_randomness():
        trial = copy.deepcopy(layer)
        _train(trial, frozen=True)  # as an adapter is that was read from a file
        zeros = {name: weight == 0 for name, weight in _base_weights(trial)}
        try:
            trial.merge()
        except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError):
            return True
        return any(bool((weight[zeros[name]] != 0).any()) for name, weight in _base_weights(trial) if name in zeros)


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
    try:
        difference, changes_base = try_reload(config, layer.get_base_layer())
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


def try_reload(config: PeftConfig, base: nn.Module) -> tuple[float, bool]:
    """Make an adapter on a layer, prune the layer under it, write both and read them: all on a small copy, in memory.

    Args:
        config: Of the adapter.
        base: A layer that it is for.

    Returns:
        The largest difference of an output between the adapter in memory and the one read, and whether reading it
        changes weights of the layer.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    with _own_randomness(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = copy.deepcopy(config)
        _set(config, {key: value for key, value in _PLACES.items() if hasattr(config, key)})
        if _begins_in_its_own_way(config):
            _set(config, {key: value for key, value in _BEGUN.items() if hasattr(config, key)})
        layer = _small_copy(base)
        inputs = _inputs_of(layer)
        # With autograd: some tuners hook the gradients of what they train.
        with torch.enable_grad():
            made = get_peft_model(nn.ModuleDict({_NAME: layer}), copy.deepcopy(config))
        _train(made)
        weights = dict(_base_weights(made))
        for weight in weights.values():
            weight[torch.rand(weight.shape) < 0.5] = 0
        sparse = [weight.clone() for weight in weights.values()]
        again = _small_copy(base)
        again.load_state_dict(_bare_state(made))
        with torch.enable_grad():
            read = get_peft_model(nn.ModuleDict({_NAME: again}), copy.deepcopy(config))
        set_peft_model_state_dict(read, get_peft_model_state_dict(made))
        now = [weight for _, weight in _base_weights(read)]
        changed = any(not torch.equal(old, new) for old, new in zip(sparse, now, strict=True))
        if inputs is None:
            return float(changed), changed
        one, other = (_layer_of(model).eval()(inputs) for model in (made, read))
        return float((one - other).abs().max()), changed


def _layer_of(model: nn.Module) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.rpartition(".")[2] == _NAME)


def _bare_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the layer under an adapter, by its own names."""
    own = _layer_of(model)
    inner = {
        canonical_name(f"{_NAME}.{name}").removeprefix(f"{_NAME}."): tensor for name, tensor in own.named_parameters()
    }
    bare = {
        f"{path}.{name}".removeprefix(f"{_NAME}.")
        for path, module in base_modules(nn.ModuleDict({_NAME: own})).items()
        for name, _ in module.named_parameters(recurse=False)
    }
    return {name: tensor for name, tensor in inner.items() if name in bare}


def _base_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The weights under the adapters in a model or layer."""
    return [
        (f"{path}.{name}", parameter)
        for path, module in base_modules(model).items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    ]


def _train(model: nn.Module, frozen: bool = False) -> None:
    """Give the adapters, or also what is frozen of them, other values, as training does; their bases stay."""
    under = {id(parameter) for module in base_modules(model).values() for parameter in module.parameters(recurse=False)}
    for parameter in model.parameters():
        trains = frozen or parameter.requires_grad
        if trains and id(parameter) not in under and parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))


def _small_copy(base: nn.Module) -> nn.Module:
    """A layer like this one on the CPU, in floats."""
    if isinstance(base, nn.Linear):  # quantized ones, too
        return nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    return copy.deepcopy(base).cpu().float()


def _inputs_of(base: nn.Module) -> Tensor | None:
    if isinstance(base, nn.Linear):
        return torch.randn(4, base.in_features)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return torch.randn(2, base.in_channels, *(2 * size + 1 for size in base.kernel_size))
    return torch.randn(4, base.weight.shape[0]) if type(base).__name__ == "Conv1D" else None


def _begins_in_its_own_way(config: PeftConfig) -> bool:
    return isinstance(getattr(config, "init_lora_weights", None), str)


def _set(config: PeftConfig, values: dict[str, Any]) -> None:
    for key, value in values.items():
        setattr(config, key, value)


def _title(config: PeftConfig) -> str:
    return f"PEFT's {type(config).__name__.removesuffix('Config')}"


@contextmanager
def _own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
