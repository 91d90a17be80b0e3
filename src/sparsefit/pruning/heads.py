"""The parts of a model that stay dense by default: its output layers, and the routers of its experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from sparsefit.bare_model import base_modules
from sparsefit.pruning.layers import matrices_of
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.layers.experts import find_stacks
from sparsefit.pruning.tracing import Trace, matrix_names

_ROUTERS = frozenset({"router", "gate", "gating"})


def output_layers(model: nn.Module, blocks: Iterable[nn.Module] = (), trace: Trace | None = None) -> frozenset[str]:
    """The names of the parameters that compute a model's output: its head.

    With a trace these are the last matrices on a sample's path to the output. A model has no head if that is several
    matrices in the repeated blocks (the residual stream carries them all to the output), or one that blocks share.
    Without a trace these are what a transformers model holds outside its `base_model`; in other models the last matrix
    outside the blocks.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    >>> output_layers(model)
    frozenset({'2.1.weight'})
    """
    blocks = list(blocks)
    if trace is not None:
        names = matrix_names(model)
        uses = Counter(names[p] for block in blocks for p in {*map(id, block.parameters())} if p in names)
        found = (last for last in trace.outputs if (len(last) == 1 and uses[min(last)] < 2) or not last & uses.keys())
        return frozenset().union(*found)
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = {path: module for path, module in base_modules(model).items() if id(module) not in inside}
    heads = _outside_base_models(outside.values())
    members = {path: module for path, module in outside.items() if not heads or id(module) in heads}
    found = [weight.name.partition("[")[0] for path, module in members.items() for weight in matrices_of(module, path)]
    return frozenset(found if heads else found[-1:])


def _outside_base_models(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the modules that transformers models hold outside their base model, and of their output embeddings."""
    heads: set[int] = set()
    for module in modules:
        if callable(getattr(module, "get_output_embeddings", None)):
            head = module.get_output_embeddings()
            heads |= set() if head is None else {id(head)}
        base = getattr(module, "base_model", None) if getattr(module, "base_model_prefix", None) else None
        if isinstance(base, nn.Module) and base is not module:
            heads |= {id(part) for part in module.modules()} - {id(part) for part in base.modules()} - {id(module)}
    return heads


def expert_lists(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, list[nn.Module]]:
    """The lists of modules that are experts, by name: lists named "expert", or lists of modules of one type in a block.

    In a list named "expert", members without parameters are no experts (NLLB keeps its dropout there).

    >>> moe = nn.ModuleDict({"router": nn.Linear(4, 2), "experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    >>> list(expert_lists(moe, []))
    ['experts']
    """
    blocks = list(blocks)
    own = {id(block) for block in blocks}
    inside = {id(module) for block in blocks for module in block.modules()} - own
    found = {}
    for name, module in base_modules(model).items():
        called_so = "expert" in name.rpartition(".")[2]
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) or not (called_so or id(module) in inside):
            continue
        members = [m for m in module.children() if not called_so or next(m.parameters(), None) is not None]
        if len(members) > 1 and len({*map(type, members)}) == 1 and not own & {*map(id, members)}:
            found[name] = members
    return found


def routers(model: nn.Module, weights: Iterable[PrunableWeight], blocks: Iterable[nn.Module]) -> set[str]:
    """The names of the weights that decide which experts a token is sent to, or how much of a shared expert it gets.

    A router is in the same module as the experts (or as a module named "experts", even if that computes them in its
    own way, as DBRX does), and has one row for each expert, or a single row, or the name of a router.

    >>> moe = nn.ModuleDict({"choice": nn.Linear(4, 2), "experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    >>> weights = [weight for name, module in moe.named_modules() for weight in matrices_of(module, name)]
    >>> routers(moe, weights, [])
    {'choice.weight'}
    """
    modules, found = base_modules(model), set()
    places = [(name.rpartition(".")[0], name, len(members)) for name, members in expert_lists(model, blocks).items()]
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        for _, stack, _ in find_stacks(module):
            alone = not any(matrices_of(child) for child in module.modules() if child is not module)
            places.append((parent if alone else name, name, len(stack)))
        if own == "experts":
            places.append((parent, name, 0))
    for weight in weights:
        for holder, experts, count in places:
            prefix = f"{holder}." if holder else ""
            own = weight.index is not None or (experts != holder and weight.name.startswith(f"{experts}."))
            if own or not weight.name.startswith(prefix):
                continue
            parts = weight.name.removeprefix(prefix).split(".")
            if weight.shape[0] in (1, count) or _ROUTERS & set(parts):
                found.add(weight.name)
    return found
