"""Dividing the input groups among ranks: each rank solves some and sends their masks and new values to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch

from sparsefit.pruning.input_groups import InputGroup
from sparsefit.pruning.layers.base import is_dense
from sparsefit.pruning.layers.sharded import ShardedWeight
from sparsefit.pruning.masks import pack_bits, unpack_bits
from sparsefit.pruning.steps import ByWeight, Solution
from sparsefit.ranks import errors_on_all_ranks, from_all, number_of_ranks, of_rank, own_rank, shared_out

AT_ONCE = 4  # groups per rank between two exchanges; a block of a language model has about four

Solve = Callable[[InputGroup, ByWeight], Solution]


def solutions(groups: Sequence[InputGroup], solve: Solve) -> Iterator[tuple[InputGroup, Solution]]:
    """Yield each group with its solution, in the order given and identical on all ranks.

    One rank solves a group and sends the solution to the others. So the work is divided, and rounding on different
    hardware cannot make the models differ. An error on one rank is raised on all. `solve` is called with a group and
    the dense matrices of its weights, on one of the ranks.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> group = InputGroup(matrices_of(torch.nn.Linear(2, 1)), {"weight": []})
    >>> [(_, solution)] = solutions([group], lambda group, dense: Solution({"weight": dense["weight"] != 0}))
    >>> solution.masks
    {'weight': tensor([[True, True]])}
    """
    step = AT_ONCE * number_of_ranks() if number_of_ranks() > 1 else 1
    for start in range(0, len(groups), step):
        some = groups[start : start + step]
        solvers = shared_out([_cost(group) for group in some])
        with errors_on_all_ranks():
            own = _own_matrices(some, solvers)
            solved = {number: solve(some[number], dense) for number, dense in own.items()}
        yield from zip(some, _exchanged(some, solvers, solved), strict=True)


def _own_matrices(groups: Sequence[InputGroup], solvers: Sequence[int]) -> dict[int, ByWeight]:
    """The dense matrices of the groups that this rank solves, by number; sharded ones are gathered by all ranks."""
    own = {}
    for number, (group, solver) in enumerate(zip(groups, solvers, strict=True)):
        mine = solver == own_rank()
        dense = {w.name: w.matrix() for w in group.weights if mine or isinstance(w, ShardedWeight)}
        own |= {number: dense} if mine else {}
    return own


def _cost(group: InputGroup) -> int:
    """The number of multiplications up to a constant: factoring a Gram matrix and solving rows with it, or scoring."""
    cost = 0
    for statistics, rows in group.by_statistics().items():
        width, height = len(statistics["squared_norm"]), sum(own.stop - own.start for _, own in rows)
        cost += width * width * (width + height) if statistics.has("gram") else width * height
    return cost or sum(prod(weight.shape) for weight in group.weights)  # without statistics


def _exchanged(groups: Sequence[InputGroup], solvers: Sequence[int], solved: dict[int, Solution]) -> Iterator[Solution]:
    """The solution of each group, from the rank that has it."""
    if number_of_ranks() == 1:
        yield from solved.values()
        return
    accounts = from_all({number: (own.values is not None, own.errors, own.notes) for number, own in solved.items()})
    told = {number: account for own in accounts for number, account in own.items()}
    for number, (group, solver) in enumerate(zip(groups, solvers, strict=True)):
        has_values, errors, notes = told[number]
        mine = solved.pop(number, None)
        yield Solution(*_sent(group, mine, solver, has_values), errors, notes)


def _sent(group: InputGroup, mine: Solution | None, solver: int, has_values: bool) -> tuple[ByWeight, ByWeight | None]:
    """Send the masks, at one bit a weight, and only the kept values, in the dtype in which the weights are stored."""
    masks, values = {}, {}
    for weight in group.weights:
        name, device, size = weight.name, weight.device, weight.shape[0] * weight.shape[1]
        bits = pack_bits(mine.masks[name]) if mine else torch.empty(-(-size // 8), dtype=torch.uint8)
        mask = masks[name] = unpack_bits(of_rank(bits.to(device), solver), weight.shape, device)
        if has_values:
            dtype = weight.parameter.dtype if is_dense(weight.parameter) else torch.float32
            empty = torch.zeros(weight.shape, dtype=dtype, device=device)
            kept = mine.values[name][mask].to(dtype) if mine else empty[mask]
            values[name] = empty.masked_scatter_(mask, of_rank(kept, solver))
    return masks, values if has_values else None
