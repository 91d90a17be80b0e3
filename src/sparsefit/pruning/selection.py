"""Which weights of a comparison group are removed: pure functions from (out, in) scores, without NaN, to masks.

Every selection removes an exact number of weights; among equal scores the lowest index is removed first, in row-major
order of the matrix. A stable ascending sort would give the same, but is not needed: a threshold splits a group into
weights to remove, weights to keep, and ties. On a GPU the kernels of `selection_kernels` give the same masks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import floor
from types import ModuleType
from warnings import warn

import numpy as np
import torch
from torch import Tensor

from sparsefit.errors import ConfigError
from sparsefit.pruning.layers.base import CHUNK
from sparsefit.pruning.scores import Products, Scores, computed

AXES = ("output", "input", "layer", "variant")
SPELLING = re.compile(r"(\w+)|(\w+)\s*:\s*(\d+)|[(\[]\s*['\"]?(\w+)['\"]?\s*,\s*(\d+)\s*[)\]]")


@dataclass(frozen=True)
class Granularity:
    """Which weights of an (out, in) matrix compete with each other (arXiv 2306.11695, Table 5).

    Args:
        axis: "output": `size` consecutive rows with all their inputs; "input": `size` consecutive columns with all
            their outputs; "layer": the whole matrix; "variant": each row, by a share of the sum of its scores
            (`use_variant` in the paper's code).
        size: Rows or columns of one group; the last group is smaller where they do not divide evenly.
    """

    axis: str
    size: int = 1

    @classmethod
    def parse(cls, value: object) -> Granularity:
        """Read "output", "input", "layer", "variant", ("output", 128), "(output, 128)" or "output:128".

        >>> Granularity.parse("input:4")
        Granularity(axis='input', size=4)
        """
        if isinstance(value, Granularity):
            return value
        axis, sized = None, []
        if isinstance(value, str) and (match := SPELLING.fullmatch(value.strip())):
            axis, *numbers = filter(None, match.groups())
            sized = [int(number) for number in numbers]
        elif isinstance(value, tuple | list) and len(value) == 2:
            axis, *sized = value
        if axis not in (AXES[:2] if sized else AXES) or not all(type(size) is int and size > 0 for size in sized):
            raise ConfigError(
                f"unknown granularity {value!r}; the choices are 'output', 'input', 'layer', 'variant', and groups of "
                "k rows ('output', k) or of k columns ('input', k), where k is a whole number from 1 on"
            )
        return cls(axis, *sized)

    def __str__(self) -> str:
        return self.axis if self.size == 1 else f"({self.axis}, {self.size})"


@cache
def triton_works(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device; tried once per device. If not, tensor operations are used.

    >>> triton_works(torch.device("cpu"))
    False
    """
    if device.type != "cuda":
        return False
    try:
        from sparsefit.pruning.selection_kernels import n_of_m

        n_of_m(torch.ones(1, 4, device=device), None, 2, 4)
    except Exception as error:  # no Triton or C compiler, a GPU that is too old, ...: they have no common class
        warn(f"Triton does not work on {device} ({error}); slower tensor operations are used", stacklevel=2)
        return False
    return True


def select(scores: Scores, granularity: Granularity, amount: Fraction | int) -> Tensor:
    """The (out, in) mask that removes the floor(size * amount) smallest scores of each comparison group. An integer is
    the number to remove in all: each group loses the floor of its share, and the first ones lose one more each.

    >>> select(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), Granularity("layer"), Fraction(1, 2)).tolist()
    [[True, False], [True, False]]
    >>> select(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), Granularity("output"), 3).tolist()
    [[False, False], [True, False]]
    """
    if granularity.axis == "variant":
        return select_variant(computed(scores), amount)
    dim = 1 if granularity.axis == "input" else 0
    scores = computed(scores) if dim == 1 else scores
    matrix = _matrix(scores)
    if not matrix.numel():
        return torch.ones_like(matrix, dtype=torch.bool)
    total = amount if isinstance(amount, int) else None
    share = amount if total is None else Fraction(total, matrix.numel())
    width = matrix.shape[dim]
    size = width if granularity.axis == "layer" else min(granularity.size, width)
    pieces = [piece for piece in matrix.split([width - width % size, width % size], dim) if piece.numel()]
    groups = [piece.unflatten(dim, (-1, min(size, piece.shape[dim]))).movedim(dim, 0) for piece in pieces]
    counts = [floor(piece[0].numel() * share) for piece in groups]
    lacking = 0 if total is None else total - sum(len(g) * count for g, count in zip(groups, counts, strict=True))
    masks = []
    for piece, count in zip(groups, counts, strict=True):  # (groups, rows, columns)
        rows, more = piece.flatten(1), min(lacking, len(piece))
        lacking -= more
        parts = [(_of(scores, part), n) for part, n in ((rows[:more], count + 1), (rows[more:], count)) if len(part)]
        kept = _joined([mask_of_smallest(part, n) for part, n in parts], 0)
        masks.append(kept.view(piece.shape).movedim(0, dim).flatten(dim, dim + 1))
    return _joined(masks, dim)


def _matrix(scores: Scores) -> Tensor:
    """A tensor with the shape and device of the scores."""
    return scores.weight if isinstance(scores, Products) else scores


def _of(scores: Scores, matrix: Tensor) -> Scores:
    """The scores of some rows of their matrix, or of several rows joined into one."""
    return scores._replace(weight=matrix) if isinstance(scores, Products) else matrix


def _joined(masks: list[Tensor], dim: int) -> Tensor:
    return masks[0] if len(masks) == 1 else torch.cat(masks, dim)


def mask_of_smallest(scores: Scores, count: int) -> Tensor:
    """The mask that removes the `count` smallest scores of each row; ties go to the lowest column.

    >>> mask_of_smallest(torch.tensor([[2.0, 1.0, 1.0, 1.0]]), 2)
    tensor([[ True, False, False,  True]])
    """
    matrix = _matrix(scores)
    if count == 0:
        return torch.ones_like(matrix, dtype=torch.bool)
    if kernels := _kernels(scores):
        return kernels.mask_of_smallest(*_operands(scores), count)
    kept = torch.empty(matrix.shape, dtype=torch.bool, device=matrix.device)
    rows = _rows_at_once(matrix)
    for part, out in zip(matrix.split(rows), kept.split(rows), strict=True):
        exact = computed(_of(scores, part))
        exact = exact if exact.dtype == torch.float64 else exact.float()
        if exact.device.type == "cpu":
            # NumPy's vectorised quickselect takes an eighth of the time of torch's, and a fortieth of a stable sort's.
            ordered = torch.from_numpy(np.partition(exact.detach().numpy(), count - 1, axis=1))
        else:
            ordered = exact.sort(dim=1).values
        threshold = ordered[:, count - 1 : count]
        torch.gt(exact, threshold, out=out)
        _keep_surplus_ties(exact, threshold, count, out)
    return kept


def _kernels(scores: Scores) -> ModuleType | None:
    """The kernels if they can be used: they compare in float32 and index columns with 32 bits."""
    matrix = _matrix(scores)
    exact = isinstance(scores, Products) or matrix.dtype != torch.float64
    if not (exact and matrix.shape[1] < 2**31 - 2**14 and triton_works(matrix.device)):
        return None
    from sparsefit.pruning import selection_kernels  # imports Triton

    return selection_kernels


def _operands(scores: Scores) -> tuple[Tensor, Tensor | None]:
    """The kernels' arguments: values and the factor of their magnitudes, or the scores themselves and None."""
    if not isinstance(scores, Products):
        return scores, None
    factor = scores.weight.new_ones(1, dtype=torch.float32) if scores.factor is None else scores.factor
    return scores.weight, factor.contiguous()


def _rows_at_once(matrix: Tensor) -> int:
    most = (CHUNK if matrix.device.type == "cpu" else 2**25) // max(matrix.shape[1], 1)
    return max(min(most, len(matrix)), 1)


def _keep_surplus_ties(scores: Tensor, threshold: Tensor, count: int, kept: Tensor) -> None:
    """Where too many scores would be removed, keep the rightmost of those equal to the (rows, 1) threshold."""
    whole = torch.int32 if scores.shape[1] < 2**31 else torch.int64
    surplus = scores.shape[1] - count - kept.sum(dim=1, dtype=whole)
    rows = surplus.nonzero().squeeze(1)
    if len(rows):
        ties = scores == threshold if len(rows) == len(scores) else scores[rows] == threshold[rows]
        rank = ties.cumsum(1, dtype=whole)
        kept[rows] |= ties & (rank > rank[:, -1:] - surplus[rows, None])


def select_n_of_m(scores: Scores, n: int, m: int) -> Tensor:
    """The (out, in) mask that removes the m - n smallest scores of each group of m consecutive inputs of a row.

    A weight's rank in its group is the number of members that are removed before it: smaller ones, and equal ones on
    its left. Ranks start as positions in the group. Comparing the scores with themselves shifted by d settles all pairs
    at distance d: if the right one is smaller, the left one's rank rises by one and the right one's falls by one.

    >>> select_n_of_m(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 2, 4)
    tensor([[ True, False, False,  True]])
    """
    matrix = _matrix(scores)
    inputs = matrix.shape[1]
    if inputs % m:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {m}")
    if m <= 64 and (kernels := _kernels(scores)):  # a group must fit in a program's registers
        return kernels.n_of_m(*_operands(scores), n, m)
    kept = torch.empty(matrix.shape, dtype=torch.bool, device=matrix.device)
    rows = _rows_at_once(matrix)
    place = torch.arange(rows * inputs, device=matrix.device).remainder_(m).to(torch.int8 if m <= 128 else torch.int16)
    same_group = [place < m - distance for distance in range(m)]  # both of the pair are in one group
    for some, out in zip(matrix.split(rows), kept.split(rows), strict=True):
        part = computed(_of(scores, some)).flatten()
        rank = place[: len(part)].clone()
        for distance in range(1, m):
            right_first = torch.lt(part[distance:], part[:-distance])
            right_first &= same_group[distance][: len(right_first)]
            rank[:-distance] += right_first.view(torch.int8)
            rank[distance:] -= right_first.view(torch.int8)
        torch.ge(rank, m - n, out=out.view(-1))
    return kept


def select_variant(scores: Tensor, sparsity: Fraction) -> Tensor:
    """The (out, in) mask of the Wanda variant: each row loses its smallest scores up to a share of the row's sum.

    A row's threshold is its largest score whose cumulative sum, in ascending order, is at most alpha times the sum
    of the row; scores up to it are removed. One alpha for the matrix is bisected in [0, 1] until its sparsity is within
    0.001 of the target (within one weight, in a small matrix). If ties prevent that, exactly the target number is
    removed: scores whose cumulative sum is the smallest share of their row's sum, the lowest index first.

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
    kept = scores > threshold
    if nearest <= max(0.001, 1 / scores.numel()) and bool(kept.any()):
        return kept
    shares = (sums / sums[:, -1:]).nan_to_num_(nan=0)  # 0 / 0 is a row of zeros
    shares = torch.empty_like(shares).scatter_(1, scores.argsort(dim=1, stable=True), shares)
    return mask_of_smallest(shares.view(1, -1), floor(scores.numel() * sparsity)).view(scores.shape)
