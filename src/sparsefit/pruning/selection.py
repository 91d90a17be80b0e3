"""Which weights of a comparison group lose. Pure functions from scores to masks (True = kept).

Every selection removes an exact number of weights; among equal scores the lowest index goes first, in row-major
order of the matrix. That is what a stable ascending sort would remove, but none is needed: a threshold splits a
group into what goes, what stays and the ties, and only groups with surplus ties count them.

Scores are (out, in), of any floating dtype, on any device, without NaN; or they are `Products`, which need not be
computed before they are compared. On a GPU Triton kernels read each score once, in long rows four times (`kernels`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsefit.errors import ConfigError

AXES = ("output", "input", "layer", "variant")
SPELLING = re.compile(r"(\w+)|(\w+)\s*:\s*(\d+)|[(\[]\s*['\"]?(\w+)['\"]?\s*,\s*(\d+)\s*[)\]]")

CHUNK = 2**20  # scores that are worked on at once on a CPU: they and their temporaries stay in its cache
LONG_ROW = 2**16  # scores of which a GPU sorts all sooner than it finds one by `kthvalue`, which gives a row one SM


class Products(NamedTuple):
    """The scores |W_ij| * f_j in float32, not computed yet: those of Wanda, its l1 and l-infinity norms and magnitude.

    A selection takes them in place of scores, with the same mask to the bit. On a GPU that saves the pass that writes
    the scores and those that read them; elsewhere they are computed.

    Attributes:
        weight: (out, in), any floating dtype.
        factor: (in,) float32, not negative; None is one for all. Wanda's is the root of the squared norms. It is
            repeated along rows that join several of in weights.

    >>> select(Products(torch.tensor([[1.0, -3.0]]), torch.tensor([4.0, 1.0])), Granularity("output"), Fraction(1, 2))
    tensor([[ True, False]])
    """

    weight: Tensor
    factor: Tensor | None = None

    def scores(self) -> Tensor:
        """(out, in) float32.

        >>> Products(torch.tensor([[1.0, -3.0]]), torch.tensor([4.0, 1.0])).scores()
        tensor([[4., 3.]])
        """
        magnitude = self.weight.float().abs()
        if self.factor is not None and magnitude.numel():
            magnitude.unflatten(1, (-1, len(self.factor))).mul_(self.factor)
        return magnitude

    def largest(self) -> Tensor:
        """The largest score, (), float32; infinite or NaN if any score is. Computes none but the largest of columns.

        >>> Products(torch.tensor([[1.0, -3.0]]), torch.tensor([4.0, 1.0])).largest()
        tensor(4.)
        """
        columns = torch.linalg.vector_norm(self.weight, torch.inf, dim=0).float()
        return (columns if self.factor is None else columns * self.factor).max()


Scores = Tensor | Products


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The module `kernels` where Triton works on the tensor's device, else None. Triton is not imported before that.

    >>> kernels_for(torch.ones(1)) is None
    True
    """
    if tensor.device.type != "cuda":
        return None
    from sparsefit.pruning import kernels

    return kernels if kernels.available(tensor.device) else None


@dataclass(frozen=True)
class Granularity:
    """Which weights of an (out, in) matrix compete with each other (arXiv 2306.11695, Table 5).

    Args:
        axis: "output": `size` consecutive rows with all their inputs; "input": `size` consecutive columns with all
            their outputs; "layer": the whole matrix; "variant": each row, by a share of the sum of its scores
            (`use_variant` in the paper's code).
        size: Rows or columns of one group; the last group is smaller where they do not divide evenly.

    Raises:
        ConfigError: for an unknown axis, a size that is not a whole number from 1 on, or a size with an axis that
            takes none.

    >>> str(Granularity("output", 128))
    '(output, 128)'
    """

    axis: str
    size: int = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.size, int) and not isinstance(self.size, bool)
        if self.axis not in AXES or not whole or self.size < 1 or (self.size > 1 and self.axis in AXES[2:]):
            raise _not_a_granularity((self.axis, self.size))

    @classmethod
    def parse(cls, value: object) -> Granularity:
        """Read "output", "input", "layer", "variant", ("output", 128), "(output, 128)" or "output:128".

        Raises:
            ConfigError: for anything else; the message names the choices.

        >>> Granularity.parse("input:4")
        Granularity(axis='input', size=4)
        """
        if isinstance(value, Granularity):
            return value
        if isinstance(value, str):
            match = SPELLING.fullmatch(value.strip())
            axis, *sized = (group for group in match.groups() if group is not None) if match else (None,)
            sized = [int(size) for size in sized]
        elif isinstance(value, tuple | list) and len(value) == 2:
            axis, sized = value[0], [value[1]]
        else:
            raise _not_a_granularity(value)
        if axis not in (AXES[:2] if sized else AXES):
            raise _not_a_granularity(value)
        return cls(axis, *sized)

    def __str__(self) -> str:
        return self.axis if self.size == 1 else f"({self.axis}, {self.size})"


def _not_a_granularity(value: object) -> ConfigError:
    return ConfigError(
        f"unknown granularity {value!r}; the choices are 'output', 'input', 'layer', 'variant', and groups of k rows "
        "('output', k) or of k columns ('input', k), where k is a whole number from 1 on"
    )


def prune_count(size: int, sparsity: Fraction) -> int:
    """floor(size * sparsity), in exact arithmetic: 300 * 0.57 is 171, not 170.

    >>> prune_count(300, Fraction("0.57"))
    171
    """
    return floor(size * sparsity)


def select(scores: Scores, granularity: Granularity, sparsity: Fraction) -> Tensor:
    """Each comparison group of (out, in) scores loses its floor(size * sparsity) smallest.

    Returns:
        (out, in) bool, True = kept.

    >>> select(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), Granularity("layer"), Fraction(1, 2)).tolist()
    [[True, False], [True, False]]
    """
    if granularity.axis == "variant":
        return select_variant(_tensor(scores), sparsity)
    return _select_in_groups(scores, granularity, lambda sizes: [(prune_count(size, sparsity), 0) for _, size in sizes])


def select_count(scores: Scores, granularity: Granularity, count: int) -> Tensor:
    """Exactly `count` of the (out, in) scores go, spread over the comparison groups by their sizes.

    Each group loses the floor of its share; what is then missing comes one each from the first groups.

    Returns:
        (out, in) bool, True = kept.

    Raises:
        ValueError: if the count is out of range, or for the variant, which has no exact counts.

    >>> select_count(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), Granularity("output"), 3).tolist()
    [[False, False], [True, False]]
    """
    matrix = _matrix(scores)
    if granularity.axis == "variant":
        raise ValueError("the variant cannot remove an exact number of weights; use another granularity")
    if not 0 <= count <= matrix.numel():
        raise ValueError(f"cannot remove {count} of {matrix.numel()} weights")
    if not matrix.numel():
        return torch.ones_like(matrix, dtype=torch.bool)

    def counts(sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        floors = [count * size // matrix.numel() for _, size in sizes]
        missing = count - sum(number * share for (number, _), share in zip(sizes, floors, strict=True))
        found = []  # below the number of groups is missing; and no group is full unless all are
        for (number, _), share in zip(sizes, floors, strict=True):
            found.append((share, min(missing, number)))
            missing -= found[-1][1]
        return found

    return _select_in_groups(scores, granularity, counts)


def _tensor(scores: Scores) -> Tensor:
    return scores.scores() if isinstance(scores, Products) else scores


def _matrix(scores: Scores) -> Tensor:
    """A tensor of the scores' shape and device."""
    return scores.weight if isinstance(scores, Products) else scores


def _select_in_groups(
    scores: Scores, granularity: Granularity, counts: Callable[[list[tuple[int, int]]], list[tuple[int, int]]]
) -> Tensor:
    """`counts` takes the number and size of the groups of each size, and gives how many weights each of them loses and
    how many of the first of them lose one more."""
    if granularity.axis == "input" or kernels_for(_matrix(scores)) is None:
        scores = _tensor(scores)
    dim, matrix = (1 if granularity.axis == "input" else 0), _matrix(scores)
    width = matrix.shape[dim]
    size = width if granularity.axis == "layer" else min(granularity.size, width)
    if dim == 0 and matrix.numel() and width % size == 0:  # as a rule; and the fewest calls, which a GPU waits for
        rows = matrix.reshape(width // size, -1)
        (due,) = counts([tuple(rows.shape)])
        return _mask_of_rows(scores, rows, *due).reshape(matrix.shape)
    whole = width // size
    pieces = [piece for piece in matrix.split([whole * size, width - whole * size], dim) if piece.numel()]
    groups = [piece.unflatten(dim, (-1, min(size, piece.shape[dim]))).movedim(dim, 0) for piece in pieces]
    removed = counts([(len(piece), piece[0].numel()) for piece in groups])
    masks = []
    for piece, due in zip(groups, removed, strict=True):  # (groups, rows, columns)
        kept = _mask_of_rows(scores, piece.flatten(1), *due)
        masks.append(kept.view(piece.shape).movedim(0, dim).flatten(dim, dim + 1))
    return masks[0] if len(masks) == 1 else torch.cat(masks, dim)


def _mask_of_rows(scores: Scores, rows: Tensor, count: int, more: int) -> Tensor:
    """The mask of some (groups, size) rows of the scores' matrix; the first `more` of them lose count + 1."""
    parts = [
        mask_of_smallest(scores._replace(weight=some) if isinstance(scores, Products) else some, n)
        for some, n in ((rows[:more], count + 1), (rows[more:], count))
        if len(some)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mask_of_smallest(scores: Scores, count: int) -> Tensor:
    """Mask that removes the `count` smallest scores of each row; ties go to the lowest column.

    Args:
        scores: (rows, columns), without NaN.
        count: how many of each row to remove, 0 <= count <= columns.

    Returns:
        (rows, columns) bool, True = kept.

    >>> mask_of_smallest(torch.tensor([[2.0, 1.0, 1.0, 1.0]]), 2)
    tensor([[ True, False, False,  True]])
    """
    if count == 0:
        return torch.ones_like(_matrix(scores), dtype=torch.bool)
    if count == _matrix(scores).shape[1]:
        return torch.zeros_like(_matrix(scores), dtype=torch.bool)
    kept = _mask_by_kernel(scores, count)
    if kept is not None:
        return kept
    scores = _tensor(scores)
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    rows = max(1, CHUNK // scores.shape[1]) if scores.device.type == "cpu" else max(1, len(scores))
    for part, out in zip(scores.split(rows), kept.split(rows), strict=True):
        exact = part if part.dtype in (torch.float32, torch.float64) else part.float()
        threshold = _thresholds(exact, count)
        torch.gt(exact, threshold, out=out)
        _keep_surplus_ties(exact, threshold, count, out)
    return kept


def _mask_by_kernel(scores: Scores, count: int) -> Tensor | None:
    kernels = _kernels_that_compare(scores)
    if kernels is None or _matrix(scores).shape[1] > kernels.LONGEST_ROW:
        return None
    return kernels.mask_of_smallest(_matrix(scores), _factor(scores), count, magnitude=isinstance(scores, Products))


def _kernels_that_compare(scores: Scores) -> ModuleType | None:
    """The kernels, which compare in float32: scores in float64 are none for them."""
    exact = isinstance(scores, Products) or scores.dtype != torch.float64
    return kernels_for(_matrix(scores)) if exact else None


def _factor(scores: Scores) -> Tensor | None:
    return scores.factor if isinstance(scores, Products) else None


def _keep_surplus_ties(scores: Tensor, threshold: Tensor, count: int, kept: Tensor) -> None:
    """Of the scores equal to the (rows, 1) threshold, those on the right stay where too many would go."""
    surplus = scores.shape[1] - count - _count(kept)  # (rows, 1)
    rows = surplus.squeeze(1).nonzero().squeeze(1)
    if len(rows):
        scores, threshold = (scores, threshold) if len(rows) == len(scores) else (scores[rows], threshold[rows])
        ties = scores == threshold
        rank = ties.cumsum(1, dtype=torch.int32 if scores.shape[1] < 2**31 else torch.int64)
        kept[rows] |= ties & (rank > rank[:, -1:] - surplus[rows])


def _count(mask: Tensor) -> Tensor:
    """(rows, 1) number of True in each row."""
    return mask.sum(dim=1, keepdim=True, dtype=torch.int32 if mask.shape[1] < 2**31 else torch.int64)


def _thresholds(scores: Tensor, count: int) -> Tensor:
    """(rows, 1) the `count`-th smallest of each row."""
    if scores.device.type != "cpu":
        if scores.shape[1] > LONG_ROW:
            return scores.sort(dim=1).values[:, count - 1 : count]
        return scores.kthvalue(count, dim=1, keepdim=True).values
    # NumPy's vectorised quickselect takes an eighth of the time of torch's, and a fortieth of a stable sort's.
    return torch.from_numpy(np.partition(scores.detach().numpy(), count - 1, axis=1)[:, count - 1 : count])


def select_n_of_m(scores: Scores, n: int, m: int) -> Tensor:
    """In each group of m consecutive inputs of a row, the m - n smallest of (out, in) scores go.

    A weight's rank in its group is the number of members that go before it: smaller ones, and equal ones on its
    left. One comparison of the scores with themselves moved by d settles all pairs at distance d: if the right one
    is smaller, the left one gains a rank, and the right one loses the rank that its place had given it.

    Returns:
        (out, in) bool, True = kept.

    Raises:
        ValueError: if m does not divide the number of inputs.

    >>> select_n_of_m(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 2, 4)
    tensor([[ True, False, False,  True]])
    """
    inputs = _matrix(scores).shape[1]
    if inputs % m:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {m}")
    kernels = _kernels_that_compare(scores)
    if kernels is not None and m <= kernels.WIDEST_GROUP:
        return kernels.n_of_m(_matrix(scores), _factor(scores), n, m, magnitude=isinstance(scores, Products))
    scores = _tensor(scores)
    flat = scores.reshape(-1)
    kept = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    size = min(max(1, (CHUNK // 2 if flat.device.type == "cpu" else 2**24) // m) * m, flat.numel())
    place = torch.arange(size, device=flat.device).remainder_(m).to(torch.int8 if m <= 128 else torch.int16)
    same_group = [place < m - distance for distance in range(m)]  # the right one of the pair is in it too
    for part, out in zip(flat.split(size), kept.split(size), strict=True):
        rank = place[: len(part)].clone()
        for distance in range(1, m):
            right_first = torch.lt(part[distance:], part[:-distance])
            right_first &= same_group[distance][: len(right_first)]
            rank[:-distance] += right_first.view(torch.int8)
            rank[distance:] -= right_first.view(torch.int8)
        torch.ge(rank, m - n, out=out)
    return kept.view(scores.shape)


def select_variant(scores: Tensor, sparsity: Fraction) -> Tensor:
    """The Wanda variant: in each row, small scores go until their sum reaches a share alpha of the row's.

    A row's threshold is its largest score whose cumulative sum, in ascending order, is at most alpha times the sum
    of the row; scores up to it go. One alpha for the matrix is bisected in [0, 1] until its sparsity is within
    0.001 of the target, or, where ties or a small matrix leave nothing so near, as near as bisection comes.

    Args:
        scores: (out, in), not negative.
        sparsity: share of the matrix that shall go; 0 removes nothing.

    Returns:
        (out, in) bool, True = kept.

    Raises:
        ValueError: for negative scores, whose sums do not ascend.

    >>> select_variant(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), Fraction(1, 2))
    tensor([[False, False,  True,  True]])
    """
    if sparsity == 0 or not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    ordered = scores.sort(dim=1).values
    if bool((ordered[:, :1] < 0).any()):
        raise ValueError("the variant compares sums of scores, and some are negative; use another granularity")
    sums = ordered.cumsum(dim=1, dtype=torch.float64)
    low, high, nearest, threshold = 0.0, 1.0, 2.0, ordered[:, :1]
    for _ in range(60):
        alpha = (low + high) / 2
        going = torch.searchsorted(sums, alpha * sums[:, -1:], right=True)  # (out, 1), before ties
        candidate = ordered.gather(1, (going - 1).clamp(min=0)).masked_fill(going == 0, -torch.inf)
        reached = int(torch.searchsorted(ordered, candidate, right=True).sum()) / scores.numel()
        if abs(reached - sparsity) < nearest:
            nearest, threshold = abs(reached - sparsity), candidate
        if nearest <= 0.001:
            break
        low, high = (alpha, high) if reached < sparsity else (low, alpha)
    return scores > threshold
