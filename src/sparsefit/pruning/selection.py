"""Which weights of a comparison group lose. Pure functions from scores to masks (True = kept).

Every selection removes an exact number of weights; among equal scores the lowest index goes first. That is
what a stable ascending sort would remove, but none is needed: the k-th smallest score splits a row into what
goes, what stays and the ties, and only rows with surplus ties count them.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor

import torch
from torch import Tensor


def prune_count(size: int, sparsity: Fraction) -> int:
    """floor(size * sparsity), in exact arithmetic: 300 * 0.57 is 171, not 170."""
    return floor(size * sparsity)


def mask_of_smallest(scores: Tensor, count: int) -> Tensor:
    """Mask that removes the `count` smallest scores of each row; ties go to the lowest column.

    Args:
        scores: (rows, columns), without NaN.
        count: how many of each row to remove, 0 <= count <= columns.

    Returns:
        (rows, columns) bool, True = kept.
    """
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == scores.shape[1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values  # (rows, 1)
    kept = scores > threshold
    surplus = kept.shape[1] - count - kept.sum(dim=1)  # (rows,) ties that must stay after all
    tied_rows = surplus.nonzero().squeeze(1)
    if len(tied_rows):
        ties = scores[tied_rows] == threshold[tied_rows]
        rank_from_the_right = ties.flip(1).cumsum(1).flip(1)
        kept[tied_rows] |= ties & (rank_from_the_right <= surplus[tied_rows, None])
    return kept


def select_per_output(scores: Tensor, sparsity: Fraction) -> Tensor:
    """In each row of (out, in) scores, floor(in * sparsity) weights go (arXiv 2306.11695, Section 3)."""
    return mask_of_smallest(scores, prune_count(scores.shape[1], sparsity))


def select_per_layer(scores: Tensor, sparsity: Fraction) -> Tensor:
    """Of all (out, in) scores together, exactly floor(numel * sparsity) go; ties in row-major order."""
    return mask_of_smallest(scores.reshape(1, -1), prune_count(scores.numel(), sparsity)).view_as(scores)


def select_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """In each group of m consecutive inputs of a row, the m - n smallest of (out, in) scores go.

    A weight's rank in its group is the number of group members that go before it: smaller ones, and equal
    ones on its left. m comparisons of whole matrices are cheaper than sorting groups of m.

    Raises:
        ValueError: if m does not divide the number of inputs.
    """
    if scores.shape[1] % m:
        raise ValueError(f"{scores.shape[1]} inputs cannot be cut into groups of {m}")
    groups = scores.reshape(scores.shape[0], -1, m)  # (out, in / m, m)
    before = torch.zeros(groups.shape, dtype=torch.int16, device=scores.device)
    for j in range(m):
        other = groups[..., j : j + 1]
        before[..., :j] += other < groups[..., :j]
        before[..., j + 1 :] += other <= groups[..., j + 1 :]
    return (before >= m - n).view_as(scores)


GRANULARITIES: dict[str, Callable[[Tensor, Fraction], Tensor]] = {
    "output": select_per_output,
    "layer": select_per_layer,
}
