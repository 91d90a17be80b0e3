"""Which matrices of a model are pruned; for every other one the reason why it stays dense."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sparsefit.errors import ConfigError
from sparsefit.pruning.config import Pattern, PruningConfig
from sparsefit.pruning.finite import all_finite
from sparsefit.pruning.layers import matrices_of, reason_left_dense
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.layers.quantized import awaits_quantization
from sparsefit.pruning.naming import base_modules, copied_modules, layer_name, matches

EXCLUDED = "excluded by the configuration"
CHECKS: list[Callable[[nn.Module, PruningConfig], None]] = []
"""What else is seen to before a weight changes: each raises a ConfigError for a model that must not be pruned so."""
HEAD_NAMES = frozenset({"lm_head", "head", "classifier", "score", "embed_out", "output_projection", "qa_outputs"})


def find_weights(
    model: nn.Module, blocks: Iterable[nn.Module], config: PruningConfig
) -> tuple[list[PrunableWeight], dict[str, str]]:
    """The weights that a configuration prunes, in the order of the model, and those that stay dense.

    Args:
        model: Any module; adapters in it are never pruned, the layers they wrap are.
        blocks: Its repeated blocks; without targets only the layers inside them are pruned, or, if there are
            none, all but the output layer.
        config: Its `targets`, `exclude` and `pattern` are used.

    Returns:
        The prunable weights, and for each other matrix of the model its name and the reason.

    Raises:
        ConfigError: if nothing would be pruned, a target does not exist, N:M does not divide a width, or weights
            are NaN or infinite.

    >>> model = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
    >>> weights, left_dense = find_weights(model, [], PruningConfig())
    >>> [weight.name for weight in weights], left_dense
    (['body.weight'], {'head.weight': 'output layer'})
    """
    candidates = [w for name, module in base_modules(model).items() for w in matrices_of(module, name)]
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConfigError(f"{lazy[0]} has no shape yet: run the model on one batch first, which gives it one")
    waiting = [name for name, module in base_modules(model).items() if awaits_quantization(module)]
    if waiting:
        raise ConfigError(
            f"{waiting[0]} is to be quantized by bitsandbytes and is not yet: move the model to its device first "
            "(`model.to('cpu')` or `.to('cuda')`), which quantizes it"
        )
    _check_names_exist((*(config.targets or ()), *config.exclude), [layer_name(w.name) for w in candidates])
    _check_unmerged(model)
    for check in CHECKS:
        check(model, config)
    copied = copied_modules(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outputs = _output_layers(model)

    found: dict[tuple[int, int | None], PrunableWeight] = {}
    reasons: dict[int, str] = {}
    for weight in candidates:
        reason = _reason_to_keep(weight, config, inside, embedded, outputs, copied)
        key = (id(weight.parameter), weight.index)
        if reason:
            reasons[id(weight.parameter)] = reason
        elif key not in found:
            found[key] = weight
        elif weight.layers[0] not in found[key].layers:  # one layer may stand under several names
            found[key] = replace(found[key], layers=(*found[key].layers, *weight.layers))
    # A weight that two layers share is excluded with either.
    weights = [weight for weight in found.values() if reasons.get(id(weight.parameter)) != EXCLUDED]
    if not weights:
        raise ConfigError(
            f"{type(model).__name__} has no prunable weights: no layer is left to prune"
            + (f" after targets={config.targets}, exclude={config.exclude}" if config.targets or config.exclude else "")
        )
    _check_at_hand(weights)
    _check_widths(weights, config.structure)
    _check_finite(weights)
    return weights, _left_dense(model, {id(weight.parameter) for weight in weights}, reasons)


def _output_layers(model: nn.Module) -> set[int]:
    outputs = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in HEAD_NAMES:
            outputs |= {id(m) for m in module.modules()}
        if callable(getattr(module, "get_output_embeddings", None)):
            head = module.get_output_embeddings()
            outputs |= {id(head)} if head is not None else set()
    return outputs


def _reason_to_keep(
    weight: PrunableWeight,
    config: PruningConfig,
    inside: set[int],
    embedded: set[int],
    outputs: set[int],
    copied: set[int],
) -> str | None:
    name, layer = layer_name(weight.name), weight.layers[0]
    if matches(name, config.exclude):
        return EXCLUDED
    if not weight.parameter.numel():
        return "has no weights"
    if id(layer) in copied:
        return "the model computes with a copy of it that PEFT trains (modules_to_save)"
    if id(weight.parameter) in embedded:
        return "shared with an embedding"
    if config.targets is not None:
        return None if matches(name, config.targets) else "not among the targets"
    if inside and id(layer) not in inside:
        return "outside the repeated blocks"
    if any(part.startswith("downsampl") for part in name.split(".")):
        return "downsampling between stages"
    if not inside and id(layer) in outputs:
        return "output layer"
    return None


def _check_names_exist(patterns: Iterable[str], names: list[str]) -> None:
    known = sorted({name.split(".", i)[-1] for name in names for i in range(name.count(".") + 1)})
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            nearest = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"no prunable layer is named '{pattern}'; "
                + (f"the nearest names are {', '.join(nearest)}" if nearest else f"the layers are {', '.join(kinds)}")
            )


def _check_unmerged(model: nn.Module) -> None:
    merged = [
        name for name, m in model.named_modules() if hasattr(m, "base_layer") and getattr(m, "merged", None) is True
    ]
    if merged:
        raise ConfigError(
            f"an adapter is merged into {merged[0]}: taking it out again would bring pruned weights back. Call "
            "unmerge_adapter() first, or merge_and_unload() to keep it for good"
        )


def _check_at_hand(weights: list[PrunableWeight]) -> None:
    absent = [weight.name for weight in weights if weight.device.type == "meta"]
    if absent:
        raise ConfigError(
            f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}: these weights are not in memory (device "
            "'meta'). Load the model without offloading to disk; one too large for the GPU is pruned from CPU memory "
            "with PruningConfig(device='cuda')"
        )


def _check_widths(weights: list[PrunableWeight], pattern: Pattern | None) -> None:
    if pattern is None:
        return
    channels = {w.name: w.shape[1] // w.positions for w in weights}
    misfits = [f"{name} ({width} inputs)" for name, width in channels.items() if width % pattern.m]
    if misfits:
        raise ConfigError(
            f"pattern '{pattern.n}:{pattern.m}' needs widths that {pattern.m} divides; it does not fit "
            f"{', '.join(misfits[:5])}{', ...' if len(misfits) > 5 else ''}: exclude them or take another pattern"
        )


def _check_finite(weights: list[PrunableWeight]) -> None:
    broken = [weight.name for weight in weights if not all_finite(weight.matrix())]
    if broken:
        raise ConfigError(
            f"{', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''}: these weights are NaN or infinite, and such "
            "weights cannot be compared. The model was left as it was; load sound ones, or exclude the layers"
        )


def _left_dense(model: nn.Module, pruned: set[int], reasons: dict[int, str]) -> dict[str, str]:
    left = {}
    for module_name, module in base_modules(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in pruned:
                continue
            default = reason_left_dense(module)
            if not parameter.is_floating_point() or parameter.element_size() == 1:
                default = f"quantized: {type(module).__name__}"
            left[f"{module_name}.{name}".lstrip(".")] = reasons.get(id(parameter), default)
        # Some quantized layers keep their weights there.
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.ndim == 2 and min(buffer.shape) > 1 and buffer.dtype != torch.bool:
                left[f"{module_name}.{name}".lstrip(".")] = f"a buffer of {type(module).__name__}, not a parameter"
    return left
