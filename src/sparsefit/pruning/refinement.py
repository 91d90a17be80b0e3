"""Improving masks at the same sparsity, by swapping a kept and a pruned weight of a row.

SparseSwaps (Zimmer et al. 2025, arXiv 2512.10922). With d the pruned weights of a row (zero elsewhere), G the Gram
matrix of the inputs and r = G d, the row's error is d G d^T. Restoring weight p and pruning weight q changes it by

    (w_p^2 G_pp - 2 w_p r_p)  +  (w_q^2 G_qq + 2 w_q r_q)  -  2 w_p w_q G_pq
         gain of p                     loss of q                both at once
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsefit.pruning.gram import precise_dtype
from sparsefit.pruning.selection import triton_works

GRID = 16  # intervals of the grid on which the bound on a pruned weight's best partner is interpolated
CANDIDATES = 16  # pruned weights of a row that are tried with every partner at once
CPU_ELEMENTS, GPU_ELEMENTS = 2**20, 2**25  # size of the largest temporary; on a CPU it should fit in the caches
_Changes = tuple[Tensor, Tensor, Tensor]


class _Rows(NamedTuple):
    """Rows that may still improve. Swaps are searched in float32 and accepted in `precise_dtype` ("precise" below)."""

    places: Tensor  # (rows,) their indices in the layer
    kept: Tensor  # (rows, in) bool
    weight: Tensor  # (rows, in) precise
    gradient: Tensor  # (rows, in) precise, r = G d
    alone: Tensor  # (rows, in) precise, w^2 G_jj: the error of pruning this weight and nothing else


def swap(weight: Tensor, mask: Tensor, gram: Tensor, max_swaps: int, pattern: tuple[int, int] | None = None) -> Tensor:
    """Improve a mask by at most `max_swaps` swaps per row of a kept and a pruned weight, while the error falls.

    Each swap is the best pair of a row (within a group of M, with a pattern (N, M)), up to float32 rounding. It is
    made only if the change of the reconstruction error, computed from the Gram matrix in `precise_dtype`, is negative
    beyond rounding. Each row (each group, with a pattern) keeps its number of zeros.

    Without a pattern, bounds on the gain of a pruned weight with any partner exclude most pairs: a swap costs about
    50 * in multiply-adds per row, where all pairs would be in^2 / 4. With a pattern it costs M * in.

    >>> gram = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.9], [0.9, 0.9, 1.0]])  # errors of the same sign add up
    >>> swap(torch.tensor([[1.0, 1.1, -1.2]]), torch.tensor([[False, False, True]]), gram, 1)
    tensor([[ True, False, False]])
    """
    refined = mask.clone()
    open_rows = (mask.any(dim=1) & ~mask.all(dim=1)).nonzero().squeeze(1)
    if max_swaps == 0 or len(open_rows) == 0:
        return refined
    gram = gram.float()
    precise_gram = gram.to(precise_dtype(gram.device))
    reach = _strongest_correlation(gram) if pattern is None else None
    for places in open_rows.split(_rows_at_once(gram, pattern)):
        own, kept = weight[places].to(precise_gram.dtype), mask[places]
        rows = _Rows(places, kept, own, own.masked_fill(kept, 0) @ precise_gram, own.square() * precise_gram.diagonal())
        for _ in range(max_swaps):
            changes = _changes(rows)
            pair = _best_pair_in_groups(changes, gram, pattern[1]) if pattern else _best_pair(changes, gram, reach)
            rows, added, removed = _make_swaps(rows, *pair, gram)
            if len(rows.places) == 0:
                break
            refined[rows.places, added] = True
            refined[rows.places, removed] = False
    return refined


def _rows_at_once(gram: Tensor, pattern: tuple[int, int] | None) -> int:
    elements = CPU_ELEMENTS if gram.device.type == "cpu" else GPU_ELEMENTS
    temporaries = pattern[1] if pattern else 1 if triton_works(gram.device) else max(GRID + 1, CANDIDATES)
    return max(elements // (len(gram) * temporaries), 1)


def _changes(rows: _Rows) -> _Changes:
    """How each half of a swap changes the error: by restoring a weight (gain) and by pruning one (loss). Infinite where
    that is not possible: kept weights cannot be restored, nor pruned ones pruned, and restoring a zero is pointless.
    Returns gain, loss and the weights, (rows, in) float32 each."""
    slope = 2 * rows.weight * rows.gradient
    gain = (rows.alone - slope).masked_fill_(rows.kept | (rows.weight == 0), torch.inf)
    loss = (rows.alone + slope).masked_fill_(~rows.kept, torch.inf)
    return gain.float(), loss.float(), rows.weight.float()


def _strongest_correlation(gram: Tensor) -> Tensor:
    """The largest |G_pq| / sqrt(G_pp G_qq) of each input p with any other input q, (in,), rounded up."""
    length = gram.diagonal().sqrt()
    strongest = torch.empty_like(length)
    for rows in torch.arange(len(gram), device=gram.device).split(1024):
        correlation = gram[rows].abs() / (length[rows, None] * length)
        correlation.scatter_(1, rows[:, None], 0)
        strongest[rows] = correlation.nan_to_num_(nan=0).amax(dim=1)  # 0 / 0 for dead inputs
    return strongest * (1 + 1e-5)


def _best_pair(changes: _Changes, gram: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """The pruned and the kept weight of each row, (rows,) each, whose swap lowers the error most; an arbitrary pair if
    no swap lowers it.

    Pruned weights are tried with all partners in the order of their bounds, until no remaining bound is below both
    zero and the best change found.
    """
    if triton_works(gram.device):
        from sparsefit.pruning.update_kernels import best_pair  # imports Triton

        return best_pair(*changes, gram, reach, GRID)
    bound = _bound(changes, gram, reach)
    best = torch.full_like(bound[:, 0], torch.inf)
    added, removed = torch.zeros_like(best, dtype=torch.long), torch.zeros_like(best, dtype=torch.long)
    pending = torch.arange(len(best), device=best.device)
    while len(pending):
        gain, loss, weight = (part[pending] for part in changes)
        candidates = bound[pending].topk(min(CANDIDATES, bound.shape[1]), dim=1, largest=False).indices
        change = gram.index_select(0, candidates.flatten()).view(*candidates.shape, -1)
        change.mul_(weight[:, None, :]).mul_(weight.gather(1, candidates)[:, :, None] * -2).add_(loss[:, None, :])
        least, which = (change.amin(dim=2) + gain.gather(1, candidates)).min(dim=1)
        better = (least < best[pending]).nonzero().squeeze(1)
        improved, which = pending[better], which[better]
        best[improved] = least[better]
        added[improved] = candidates[better, which]
        removed[improved] = change[better, which].argmin(dim=1)
        bound[pending[:, None], candidates] = torch.inf
        pending = pending[bound[pending].amin(dim=1) < best[pending].clamp_max(0)]
    return added, removed


def _bound(changes: _Changes, gram: Tensor, reach: Tensor) -> Tensor:
    """A lower bound on the error change of any swap that restores a weight, (rows, in); infinite for kept weights.

    With s_j = |w_j| sqrt(G_jj) and c_p the strongest correlation of input p, a partner q adds at least
    loss_q - 2 (c_p s_p) s_q. The minimum over q is concave in c_p s_p, so linear interpolation between grid points is a
    lower bound.
    """
    gain, loss, weight = changes
    size = weight.abs() * gram.diagonal().sqrt()
    pull = (size * reach).masked_fill_(gain.isinf(), 0)
    step = pull.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(pull.dtype).tiny) / GRID
    grid = step * torch.arange(GRID + 1, device=step.device)  # (rows, GRID + 1)
    least = torch.addcmul(loss[:, None, :], grid[:, :, None], size[:, None, :], value=-2).amin(dim=2)
    position = pull / step
    left = position.long().clamp_max_(GRID - 1)
    return gain + torch.lerp(least.gather(1, left), least.gather(1, left + 1), position - left)


def _best_pair_in_groups(changes: _Changes, gram: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """As `_best_pair`, over all pairs within groups of `group` inputs."""
    gain, loss, weight = (part.unflatten(1, (-1, group)) for part in changes)  # (rows, groups, group)
    blocks = gram.unflatten(0, (-1, group)).unflatten(2, (-1, group)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    change = (-2 * weight)[..., :, None] * weight[..., None, :] * blocks  # (rows, groups, group, group)
    best = change.add_(gain[..., :, None]).add_(loss[..., None, :]).flatten(1).argmin(dim=1)
    place = best // group**2 * group
    return place + best // group % group, place + best % group


def _make_swaps(rows: _Rows, added: Tensor, removed: Tensor, gram: Tensor) -> tuple[_Rows, Tensor, Tensor]:
    """Make the swaps that lower the error. Returns the rows that were swapped, and the columns that each of them
    added and removed."""
    both = torch.stack([added, removed], dim=1)
    weight, slope, alone = (part.gather(1, both) for part in (rows.weight, rows.gradient, rows.alone))
    slope = slope * weight * weight.new_tensor([-2, 2])
    cross = -2 * weight.prod(dim=1) * gram[added, removed]
    change = slope.sum(dim=1) + alone.sum(dim=1) + cross
    noise = 64 * torch.finfo(change.dtype).eps * (slope.abs().sum(dim=1) + alone.sum(dim=1) + cross.abs())
    lowers = change < -noise
    if not lowers.all():
        rows = _Rows(*(part[lowers] for part in rows))
        added, removed, weight = added[lowers], removed[lowers], weight[lowers]
    rows.kept.scatter_(1, added[:, None], True).scatter_(1, removed[:, None], False)
    rows.gradient.addcmul_(gram[added].to(weight.dtype), weight[:, :1], value=-1)
    rows.gradient.addcmul_(gram[removed].to(weight.dtype), weight[:, 1:])
    return rows, added, removed
