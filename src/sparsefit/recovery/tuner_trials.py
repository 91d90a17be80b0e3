"""Tries out PEFT tuners on a layer: whether an adapter can be reloaded from its files after the layer under it was
pruned, and whether merging it fills zeros.

Each trial runs on a copy, and does not change the global random state.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsefit.bare_model import base_modules, canonical_name

if TYPE_CHECKING:
    from peft import PeftConfig

_NAME = "probe"
_PLACES = {  # settings that say where adapters go; the trial model has one layer
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
INITIALIZED = {
    "init_lora_weights": True,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}
"""LoRA's initialization settings in the configuration of an adapter that is initialized already."""


def has_named_initialization(config: PeftConfig) -> bool:
    """Whether an adapter uses a named initialization, such as PiSSA, which may also change the weights under it."""
    return isinstance(getattr(config, "init_lora_weights", None), str)


def set_values(config: PeftConfig, values: dict[str, Any]) -> None:
    """Set fields of a configuration without running the checks of its constructor."""
    for key, value in values.items():
        setattr(config, key, value)


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Seed torch's CPU generator with 0, and restore its state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)  # only the generator of the CPU
        yield


@torch.no_grad()
def fills_zeros(layer: nn.Module) -> bool:
    """Whether merging a trained adapter of this kind fills zeros of its weights; True if it cannot be merged.

    Args:
        layer: A PEFT layer on a pruned weight; a copy of it is merged, and the layer is not changed.
    """
    with fixed_seed():
        trial = copy.deepcopy(layer)
        _train(trial, frozen=True)  # an adapter that was loaded from a file is frozen
        zeros = {name: weight == 0 for name, weight in _base_weights(trial)}
        try:
            trial.merge()
        except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError):
            return True
        return any(bool((weight[zeros[name]] != 0).any()) for name, weight in _base_weights(trial) if name in zeros)


def try_reload(config: PeftConfig, base: nn.Module) -> tuple[float, bool]:
    """Create an adapter on a copy of a layer, prune the layer, and save and reload both in memory.

    Args:
        config: The configuration of the adapter.
        base: A layer that it adapts.

    Returns:
        The largest difference between outputs with the original and with the reloaded adapter, and whether reloading
        changes weights of the layer.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    with fixed_seed(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = copy.deepcopy(config)
        set_values(config, {key: value for key, value in _PLACES.items() if hasattr(config, key)})
        if has_named_initialization(config):  # such adapters are saved as initialized ones
            set_values(config, {key: value for key, value in INITIALIZED.items() if hasattr(config, key)})
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
    """The state dict of the layer under an adapter, by the layer's own names."""
    own = _layer_of(model)
    inner = {canonical_name(f".{name}").lstrip("."): tensor for name, tensor in own.named_parameters()}
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
    """Change the trainable (or, with `frozen`, all) parameters of adapters randomly, as training would; not bases."""
    under = {id(parameter) for module in base_modules(model).values() for parameter in module.parameters(recurse=False)}
    for parameter in model.parameters():
        trains = frozen or parameter.requires_grad
        if trains and id(parameter) not in under and parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))


def _small_copy(base: nn.Module) -> nn.Module:
    """A float32 layer of the same kind and shape on the CPU."""
    if isinstance(base, nn.Linear):  # quantized ones, too
        return nn.Linear(base.in_features, base.out_features, base.bias is not None, "cpu", torch.float32)
    return copy.deepcopy(base).cpu().float()


def _inputs_of(base: nn.Module) -> Tensor | None:
    if isinstance(base, nn.Linear):
        return torch.randn(4, base.in_features)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return torch.randn(2, base.in_channels, *(2 * size + 1 for size in base.kernel_size))
    return torch.randn(4, base.weight.shape[0]) if type(base).__name__ == "Conv1D" else None
