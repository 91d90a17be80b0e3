"""Which matrices of a model are pruned, and for every other one the reason why it stays dense."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sparsefit.bare_model import base_modules, copied_modules
from sparsefit.errors import ConfigError
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.pruning.config import PruningConfig, layer_name, matches
from sparsefit.pruning.heads import expert_lists, output_layers, routers
from sparsefit.pruning.layers import matrices_of, reason_left_dense
from sparsefit.pruning.layers.base import PrunableWeight, is_dense
from sparsefit.pruning.layers.sharded import counted
from sparsefit.pruning.statistics import all_finite
from sparsefit.pruning.tracing import Trace, matrix_names
from sparsefit.quantized import awaits_quantization
from sparsefit.sharded import is_sharded, over_shards, shard_of

EXCLUDED = "excluded by the configuration"
CHECKS: list[Callable[[nn.Module, PruningConfig], None]] = []
"""Further checks before any weight changes: each raises a ConfigError if the model cannot be pruned as configured."""


class Targets(NamedTuple):
    """The weights of a model that are pruned, and those that stay dense."""

    weights: list[PrunableWeight]  # in the order of the model
    left_dense: dict[str, str]  # the name of each other matrix, and why it stays dense
    sizes: dict[str, int]  # how many weights each of those has, except embeddings that are only looked up
    zeros: int  # how many of these are zero


def find_candidates(model: nn.Module, config: PruningConfig) -> list[PrunableWeight]:
    """All matrices of the bare model that could be pruned: never adapters, but the layers that they wrap.

    Raises:
        ConfigError: if weights are not initialized or quantized yet, an adapter is merged, or a target does not exist.

    >>> [weight.name for weight in find_candidates(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), PruningConfig())]
    ['0.weight']
    """
    modules = base_modules(model)
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    _refuse(lazy[:1], "{} has no shape yet: run the model on one batch first, which gives it one")
    _refuse(
        [name for name, module in modules.items() if awaits_quantization(module)][:1],
        "{} is to be quantized by bitsandbytes and is not yet: move the model to its device first (`model.to('cpu')` "
        "or `.to('cuda')`), which quantizes it",
    )
    adapters = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    _refuse(
        [name for name, module in adapters.items() if getattr(module, "merged", None) is True][:1],
        "an adapter is merged into {}: taking it out again would bring pruned weights back. Call unmerge_adapter() "
        "first, or merge_and_unload() to keep it for good",
    )
    candidates = [weight for name, module in modules.items() for weight in matrices_of(module, name)]
    names = [layer_name(weight.name) for weight in candidates]
    _check_names_exist((*(config.targets or ()), *config.exclude), names)
    wanted = [name for name in names if config.targets is None or matches(name, config.targets)]
    if all(matches(name, config.exclude) for name in wanted):
        raise ConfigError(_nothing_left(model, config, set()))
    return candidates


def find_weights(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    config: PruningConfig,
    trace: Trace | None = None,
    one_by_one: Callable[[Iterable[PrunableWeight]], Iterable[PrunableWeight]] = iter,
) -> Targets:
    """The weights that a configuration prunes, and those that stay dense.

    Without targets, the layers inside the repeated blocks are pruned or, if there are no blocks, all but the output
    layer. Weights that the trace shows no sample reaches stay dense. `one_by_one` iterates over weights whose values
    are read, so that they need not all be in memory.

    Raises:
        ConfigError: if nothing would be pruned, N:M does not divide a width, or weights are NaN or infinite; and as
            `find_candidates`.

    >>> model = nn.ModuleDict({"body": nn.Linear(4, 8), "top": nn.Linear(8, 2)})
    >>> targets = find_weights(model, [], PruningConfig())
    >>> [weight.name for weight in targets.weights], targets.left_dense
    (['body.weight'], {'top.weight': 'output layer'})
    """
    weights, candidates, reasons = _sorted_out(model, blocks, config, trace)
    _refuse(
        [weight.name for weight in weights if weight.device.type == "meta"],
        "{}: these weights are not in memory (device 'meta'). Load the model without offloading to disk; one too large "
        "for the GPU is pruned from CPU memory with PruningConfig(device='cuda')",
    )
    pattern, widths = config.structure, {weight.name: weight.shape[1] // weight.positions for weight in weights}
    _refuse(
        [f"{name} ({width} inputs)" for name, width in widths.items() if pattern and width % pattern.m],
        f"pattern '{pattern}' needs widths that {pattern and pattern.m} divides; it does not fit {{}}: exclude them or "
        "take another pattern",
    )
    broken = counted(one_by_one(weights), lambda weight: not all_finite(weight.held()))
    _refuse(
        [name for name, shards in broken.items() if shards],
        "{}: these weights are NaN or infinite, and such weights cannot be compared. The model was left as it was; "
        "load valid ones, or exclude the layers",
    )
    return _account(model, weights, candidates, reasons)


def count_weights(model: nn.Module, config: PruningConfig) -> int:
    """How many weights a configuration prunes, as far as that is known without data; reads no weight values.

    Raises:
        ConfigError: as `find_candidates`, or if nothing would be pruned.

    >>> count_weights(nn.ModuleDict({"body": nn.Linear(4, 8), "top": nn.Linear(8, 2)}), PruningConfig())
    32
    """
    return sum(math.prod(weight.shape) for weight in reached_weights(model, config, None))


def reached_weights(model: nn.Module, config: PruningConfig, trace: Trace | None) -> list[PrunableWeight]:
    """The weights that `find_weights` would choose; reads no weight values.

    Raises:
        ConfigError: as `find_candidates`, or if nothing would be pruned.

    >>> model = nn.ModuleDict({"body": nn.Linear(4, 8), "top": nn.Linear(8, 2)})
    >>> [weight.name for weight in reached_weights(model, PruningConfig(), None)]
    ['body.weight']
    """
    blocks = [block for blocks in find_block_lists(model) for block in blocks]
    return _sorted_out(model, blocks, config, trace)[0]


def _sorted_out(
    model: nn.Module, blocks: Iterable[nn.Module], config: PruningConfig, trace: Trace | None
) -> tuple[list[PrunableWeight], list[PrunableWeight], dict[int, str]]:
    """The weights to prune, all candidates, and why the others stay dense, by the id of their parameters."""
    candidates = find_candidates(model, config)
    reasons: dict[int, str] = {}  # by id of the parameter
    found: dict[tuple[int, int | None], PrunableWeight] = {}
    for weight, reason in zip(candidates, _reasons_to_keep(model, blocks, config, candidates, trace), strict=True):
        key = (id(weight.parameter), weight.index)
        if reason:
            reasons[id(weight.parameter)] = reason
        elif key not in found:
            found[key] = weight
        elif weight.layers[0] not in found[key].layers:  # one layer may have several names
            found[key] = replace(found[key], layers=(*found[key].layers, *weight.layers))
    # A weight that two layers share is excluded if either is.
    weights = [weight for weight in found.values() if reasons.get(id(weight.parameter)) != EXCLUDED]
    if not weights:
        raise ConfigError(_nothing_left(model, config, set(reasons.values())))
    return weights, candidates, reasons


def _reasons_to_keep(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    config: PruningConfig,
    candidates: Sequence[PrunableWeight],
    trace: Trace | None,
) -> list[str | None]:
    """Why each candidate stays dense, or None for one that is pruned."""
    names, blocks = matrix_names(model), list(blocks)
    unreached = _unreached(model, blocks, names, trace)

    def is_reached(block: nn.Module) -> bool:
        own = {names[id(p)] for p in block.parameters() if id(p) in names}
        return not own or not own <= unreached

    # Ignore blocks that no sample reaches.
    blocks = [block for block in blocks if is_reached(block)]
    inside = {id(module) for block in blocks for module in block.modules()}
    outputs = output_layers(model, blocks, trace)
    if not {names[id(weight.parameter)] for weight in candidates} - unreached - outputs:
        outputs = frozenset()  # a model that is only an output layer is pruned, as nothing else can be meant
    routing, copied = routers(model, candidates, blocks), copied_modules(model)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def reason_to_keep(weight: PrunableWeight) -> str | None:
        name, layer, own = layer_name(weight.name), weight.layers[0], names[id(weight.parameter)]
        if matches(name, config.exclude):
            return EXCLUDED
        if not weight.parameter.numel():
            return "has no weights"
        if id(layer) in copied:
            return "the model computes with a copy of it that PEFT trains (modules_to_save)"
        if id(weight.parameter) in embedded:
            return "output layer, shared with the embedding"
        if config.targets is not None and not matches(name, config.targets):
            return "not among the targets"
        if own in unreached and (config.targets is None or config.needs_inputs):
            return "not reached by the calibration data"
        if config.targets is not None:
            return None
        if weight.name in routing:
            return "router of experts"
        if own in outputs:
            return "output layer"
        if inside and id(layer) not in inside:
            return "outside the repeated blocks"
        if any(part.startswith("downsampl") for part in name.split(".")):
            return "downsampling between stages"
        return None

    return [reason_to_keep(weight) for weight in candidates]


def _unreached(model: nn.Module, blocks: list[nn.Module], names: dict[int, str], trace: Trace | None) -> set[str]:
    """The parameters that no sample reached. An expert counts as reached if any expert of its list was."""
    if trace is None:
        return set()
    unreached = set(names.values()) - trace.reached
    for experts in expert_lists(model, blocks).values():
        own = {names[id(p)] for expert in experts for p in expert.parameters() if id(p) in names}
        if own & trace.reached:
            unreached -= own
    return unreached


def _nothing_left(model: nn.Module, config: PruningConfig, reasons: set[str]) -> str:
    named = f" after targets={config.targets}, exclude={config.exclude}" if config.targets or config.exclude else ""
    why = f" ({'; '.join(sorted(reasons - {'not among the targets'}))})" if reasons else ""
    return f"{type(model).__name__} has no prunable weights: no layer is left to prune{named}{why}"


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


def _refuse(names: list[str], why: str) -> None:
    """Raise a `ConfigError` if there are any names. `why` is the message; {} in it is replaced by the first names."""
    if names:
        raise ConfigError(why.format(", ".join(names[:5]) + (", ..." if len(names) > 5 else "")))


def _account(
    model: nn.Module, weights: list[PrunableWeight], candidates: list[PrunableWeight], reasons: dict[int, str]
) -> Targets:
    """The weights to prune, and for all other matrices why they stay dense and how many weights and zeros they have;
    shared ones are counted once."""
    pruned = {id(weight.parameter) for weight in weights}
    left_dense: dict[str, str] = {}
    others: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in base_modules(model).items():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in pruned:
                continue
            name, reason = f"{path}.{own}".lstrip("."), reason_left_dense(module)
            if not parameter.is_floating_point() or parameter.element_size() == 1:
                reason = f"quantized: {type(module).__name__}"
            left_dense[name] = reasons.get(id(parameter), reason)
            if left_dense[name] != "embedding":
                others[id(parameter)] = (name, parameter)
        for own, buffer in module.named_buffers(recurse=False):  # some quantized layers keep their weights there
            if buffer.ndim == 2 and min(buffer.shape) > 1 and buffer.dtype != torch.bool:
                left_dense[f"{path}.{own}".lstrip(".")] = f"a buffer of {type(module).__name__}, not a parameter"
    unpacked = {weight.name: weight.shape[0] * weight.shape[1] for weight in candidates if weight.index is None}
    sizes = {name: unpacked.get(name, parameter.numel()) for name, parameter in others.values()}
    dense = {name: p for name, p in others.values() if is_dense(p) and p.device.type != "meta"}
    zeros = {name: int((shard_of(parameter) == 0).sum()) for name, parameter in dense.items()}
    zeros = over_shards(zeros, [name for name, parameter in dense.items() if is_sharded(parameter)])
    return Targets(weights, left_dense, sizes, sum(zeros.values()))
