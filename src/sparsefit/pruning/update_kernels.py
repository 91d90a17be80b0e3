"""SparseGPT's update and the search for swaps on a GPU, in Triton. The module can be imported without Triton."""
# ruff: noqa: ANN001, ANN202, SIM102, SIM108 (Triton's language: no annotation but tl.constexpr, plain branches on one)

from __future__ import annotations

import torch
from torch import Tensor

from sparsefit.pruning.selection_kernels import jit, tl, triton


@jit
def _update_kernel(
    work, kept, errors, upper, rows, inputs, size, removed, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Update the columns of some rows one after another; with a GROUP, also choose the mask of each group."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < size)
    place = row.to(tl.int64) * size + column
    weight = tl.load(work + place, mask=inside, other=0)
    error = tl.zeros([ROWS, BLOCK], tl.float32)
    if GROUP == 0:
        goes = tl.load(kept + place, mask=inside, other=1) == 0
    else:
        goes = tl.zeros([ROWS, BLOCK], tl.int32) > 0
    diagonal = tl.load(upper + column * (inputs + 1), mask=column < size, other=1)
    for j in range(size):
        if GROUP > 0:
            if j % GROUP == 0:
                score = tl.div_rn(weight * weight, diagonal * diagonal + tl.zeros([ROWS, BLOCK], tl.float32))
                rank = tl.zeros([ROWS, BLOCK], tl.int32)
                for other in tl.static_range(GROUP):
                    one = tl.sum(tl.where(column == j + other, score, 0), axis=1)[:, None]
                    rank += ((one < score) | ((one == score) & (column > j + other))).to(tl.int32)
                goes = goes | ((column >= j) & (column < j + GROUP) & (rank < removed))
        unit = tl.load(upper + j * inputs + column, mask=(column >= j) & (column < size), other=0)
        pivot = tl.sum(tl.where(column == j, unit, 0), axis=1)
        lost = tl.sum(tl.where((column == j) & goes, weight, 0), axis=1)
        lost = tl.div_rn(lost, pivot + tl.zeros([ROWS], tl.float32))[:, None]
        error = tl.where(column == j, lost, error)
        weight -= lost * tl.where(column > j, unit, 0)
    tl.store(work + place, tl.where(goes, 0, weight), mask=inside)
    tl.store(errors + place, error, mask=inside)
    tl.store(kept + place, goes == 0, mask=inside)


def update_columns(weights: Tensor, kept: Tensor, upper: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """As `weight_updates._update_columns`: prune (columns, out) weights by their mask, in place, column by column. With
    a pattern (N, M), M <= 64, the mask is filled in: the N of every M with the largest SparseGPT score are kept.

    >>> from sparsefit.pruning.weight_updates import inverse_factor, update_sequentially  # calls this function on a GPU
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"
    >>> factor = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]], device=device), damping=0.0)
    >>> mask = torch.tensor([[False, True]], device=device)
    >>> update_sequentially(torch.ones(1, 2, device=device), mask, factor).cpu()
    tensor([[0.0000, 1.5000]])
    """
    work, mask = weights.t().contiguous(), kept.t().contiguous()
    errors = torch.empty_like(work)
    rows, width = work.shape
    n, m = pattern or (0, 0)
    sizes = {"GROUP": m, "BLOCK": max(triton.next_power_of_2(width), 16), "ROWS": 16, "num_warps": 8}
    grid = (triton.cdiv(rows, 16),)
    with torch.cuda.device_of(work):
        _update_kernel[grid](work, mask, errors, upper, rows, upper.stride(0), width, m - n, **sizes)
    weights.copy_(work.t())
    kept.copy_(mask.t())
    return errors.t()


@jit
def _pair_kernel(
    gain, loss, weight, length, reach, gram, added, removed, inputs, GRID: tl.constexpr, BLOCK: tl.constexpr
):
    """The best swap of one row. See `refinement._best_pair` and `refinement._bound`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < inputs
    back = tl.load(gain + row * inputs + column, mask=inside, other=float("inf"))
    away = tl.load(loss + row * inputs + column, mask=inside, other=float("inf"))
    value = tl.load(weight + row * inputs + column, mask=inside, other=0)
    size = tl.abs(value) * tl.load(length + column, mask=inside, other=0)
    pull = tl.where(back == float("inf"), 0, size * tl.load(reach + column, mask=inside, other=0))
    step = tl.maximum(tl.max(pull) / GRID, 1.1754944e-38)
    position = pull / step
    bound = back
    lower = tl.min(away)
    for point in range(GRID):
        upper = tl.min(away - 2 * step * (point + 1) * size)
        share = position - point
        here = (share >= 0) & ((share < 1) | (point == GRID - 1))
        bound = tl.where(here, back + lower + share * (upper - lower), bound)
        lower = upper
    least, first = tl.min(bound, 0, return_indices=True)
    best, best_added, best_removed = tl.full([], float("inf"), tl.float32), first * 0, first * 0
    while least < tl.minimum(best, 0.0):
        pull_back = -2 * tl.load(weight + row * inputs + first)
        products = tl.load(gram + first.to(tl.int64) * inputs + column, mask=inside, other=0) * value
        change, partner = tl.min(products * pull_back + away, 0, return_indices=True)
        change += tl.load(gain + row * inputs + first)
        better = change < best
        best_added, best_removed = tl.where(better, first, best_added), tl.where(better, partner, best_removed)
        best = tl.where(better, change, best)
        bound = tl.where(column == first, float("inf"), bound)
        least, first = tl.min(bound, 0, return_indices=True)
    tl.store(added + row, best_added)
    tl.store(removed + row, best_removed)


def best_pair(
    gain: Tensor, loss: Tensor, weight: Tensor, gram: Tensor, reach: Tensor, grid: int
) -> tuple[Tensor, Tensor]:
    """As `refinement._best_pair`: each program handles one row and tries one pruned weight at a time. Most of the time
    goes into reading a row of the Gram matrix for each; more are tried if inputs are more correlated.

    >>> from sparsefit.pruning import refinement  # calls this function on a GPU
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"
    >>> weight, mask = torch.tensor([[3.0, 1.0]], device=device), torch.tensor([[False, True]], device=device)
    >>> refinement.swap(weight, mask, torch.eye(2, device=device), max_swaps=1).tolist()
    [[True, False]]
    """
    rows, inputs = gain.shape
    added, removed = torch.zeros(2, rows, dtype=torch.long, device=gain.device).unbind()
    block = max(triton.next_power_of_2(inputs), 16)
    sizes = {"GRID": grid, "BLOCK": block, "num_warps": min(max(block // 512, 1), 32)}
    with torch.cuda.device_of(gain):
        columns = (gram.diagonal().sqrt(), reach)
        _pair_kernel[(rows,)](gain, loss, weight, *columns, gram, added, removed, inputs, **sizes)
    return added, removed
