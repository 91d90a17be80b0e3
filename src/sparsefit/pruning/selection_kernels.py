"""The selections of `selection` on a GPU, in Triton. The module can be imported without Triton.

Scores are |value| * factor, with a float32 factor that is repeated along a row, or the values themselves if there is no
factor; values have any floating dtype. Scores are compared as integers: the bits of a float32, with all but the sign
bit of negative numbers flipped, sort like the floats.
"""
# ruff: noqa: ANN001, ANN202 (Triton's language has no annotation but tl.constexpr)

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # the CPU builds of torch come without it
    triton = tl = None

WIDEST_ROW = 2**16  # scores of a row that the registers of one program hold
SAMPLE = 2**16  # scores of a long row that are sampled to estimate its threshold


def jit(function: Callable) -> Callable:
    """`triton.jit` that does not recompile for new values of certain integers; without Triton the function unchanged.

    >>> jit(len) is len if triton is None else True
    True
    """
    varied = ["number", "step", "first", "last", "room", "count", "removed"]
    return triton.jit(function, do_not_specialize=varied) if triton else function


@jit
def _ordered(values, factor, places, columns, inside, factors, width):
    """The scores as integers that sort like them."""
    scores = tl.load(values + places, mask=inside, other=0).to(tl.float32)
    if factor is not None:
        if factors < width:
            columns = columns % factors
        scores = tl.abs(scores) * tl.load(factor + columns, mask=inside, other=0)
    bits = tl.where(scores == 0, 0, scores.to(tl.int32, bitcast=True))  # -0.0 equals 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _rows_kernel(values, factor, kept, count, factors, width, BLOCK: tl.constexpr):
    """The mask of one row: its threshold is bisected; of scores equal to it, the last are kept if too many would go."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    scores = _ordered(values, factor, place, column, inside, factors, width)
    low = tl.min(tl.where(inside, scores, 0x7FFFFFFF))
    high = tl.max(tl.where(inside, scores, low))
    scores = tl.where(inside, scores, 0x7FFFFFFF)  # sorts after all scores
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        reached = tl.sum((scores <= middle).to(tl.int32))
        low = tl.where(reached < count, middle + 1, tl.where(reached == count, middle, low))
        high = tl.where(reached < count, high, middle)
    stays = scores > high
    surplus = tl.sum((scores <= high).to(tl.int32)) - count
    if surplus > 0:
        tied = scores == high
        rank = tl.cumsum(tied.to(tl.int32), 0)
        stays = stays | (tied & (rank > tl.sum(tied.to(tl.int32)) - surplus))
    tl.store(kept + place, stays, mask=inside)


def mask_of_smallest(values: Tensor, factor: Tensor | None, count: int) -> Tensor:
    """As `selection.mask_of_smallest`, for rows of fewer than 2^31 - 2^14 scores; one program per row up to
    `WIDEST_ROW` scores.

    >>> from sparsefit.pruning import selection  # calls this function on a GPU
    >>> scores = torch.tensor([[3.0, 1.0, 2.0]], device="cuda" if torch.cuda.is_available() else "cpu")
    >>> selection.mask_of_smallest(scores, 1).tolist()
    [[True, False, True]]
    """
    values = values.contiguous()
    kept = torch.empty_like(values, dtype=torch.bool)
    rows, width = values.shape
    factors = width if factor is None else len(factor)
    with torch.cuda.device_of(values):
        if width <= WIDEST_ROW:
            block = max(triton.next_power_of_2(width), 16)
            sizes = {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 32)}
            _rows_kernel[(rows,)](values, factor, kept, count, factors, width, **sizes)
        else:
            for row, out in zip(values, kept, strict=True):
                _mask_long_row(row, factor, out, count, factors)
    return kept


@jit
def _sample_kernel(values, factor, sample, number, step, factors, width, BLOCK: tl.constexpr):
    """Every `step`-th score of a long row."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, place = index < number, index * step
    tl.store(sample + index, _ordered(values, factor, place, place, inside, factors, width), mask=inside)


@jit
def _split_kernel(values, factor, kept, sample, first, last, keys, room, found, factors, width, BLOCK: tl.constexpr):
    """The mask of a long row that keeps every score from the lower of two scores of the sorted sample on. Scores
    between the two are listed in `keys`, as far as there is room, with their position in the low bits: so no two keys
    are equal, and equal scores sort by position. `found` gets the number of scores below the bracket and in it."""
    low, high = tl.load(sample + first), tl.load(sample + last)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    scores = _ordered(values, factor, place, place, inside, factors, width)
    tl.store(kept + place, scores >= low, mask=inside)
    # Relaxed, as the numbers are only read after this kernel.
    tl.atomic_add(found, tl.sum((inside & (scores < low)).to(tl.int32)), sem="relaxed")
    listed = inside & (scores >= low) & (scores <= high)
    number = tl.sum(listed.to(tl.int32))
    if number > 0:
        index = tl.atomic_add(found + 1, number, sem="relaxed") + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(keys + index, (scores.to(tl.int64) << 32) | place, mask=listed & (index < room))


def _mask_long_row(values: Tensor, factor: Tensor | None, kept: Tensor, count: int, factors: int) -> None:
    """Usually two scores of a sample bracket the threshold: all scores below them are removed, and the smallest of the
    scores between them (one in seventy). If they do not, or too many scores are equal, all scores are sorted."""
    width = len(values)
    step = width // SAMPLE | 1  # odd, so that the sample visits all columns of a flattened matrix in turn
    number = triton.cdiv(width, step)
    sample = torch.empty(number, dtype=torch.int32, device=values.device)
    _sample_kernel[(triton.cdiv(number, 1024),)](values, factor, sample, number, step, factors, width, BLOCK=1024)
    # The rank of the threshold in a random sample of n has a standard deviation of at most sqrt(n) / 2: four of them.
    middle, margin = count * number // width, 2 * isqrt(number) + 2
    bracket = sample.sort().values, max(middle - margin, 0), min(middle + margin, number - 1)
    for room in (width // 16, width):
        keys, found = sample.new_empty(room, dtype=torch.int64), sample.new_zeros(2)
        sizes, grid = {"BLOCK": 8192, "num_warps": 8}, (triton.cdiv(width, 8192),)
        _split_kernel[grid](values, factor, kept, *bracket, keys, room, found, factors, width, **sizes)
        below, listed = found.tolist()  # the only wait for the GPU
        if listed <= room and below <= count <= below + listed:
            break
        bracket = sample.new_tensor([-(2**31), 2**31 - 1]), 0, 1
    kept.index_fill_(0, keys[:listed].sort().values[: count - below] & 0xFFFFFFFF, False)


@jit
def _groups_kernel(
    values, factor, kept, removed, factors, inputs, M: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr
):
    """Some groups of M inputs of one row: a weight is kept if at least `removed` of its group are removed before it."""
    first = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)) * M
    member = tl.arange(0, PADDED)[None, :]
    column = first[:, None] + member
    inside = (member < M) & (column < inputs)
    place = tl.program_id(0).to(tl.int64) * inputs + column
    scores = _ordered(values, factor, place, column, inside, factors, inputs)
    rank = tl.zeros([GROUPS, PADDED], tl.int32)
    for other in tl.static_range(M):
        one = tl.sum(tl.where(member == other, scores, 0), axis=1)[:, None]
        rank += ((one < scores) | ((one == scores) & (member > other))).to(tl.int32)
    tl.store(kept + place, rank >= removed, mask=inside)


def n_of_m(values: Tensor, factor: Tensor | None, n: int, m: int) -> Tensor:
    """As `selection.select_n_of_m`, for m <= 64 and the scores of `mask_of_smallest`.

    >>> from sparsefit.pruning import selection  # calls this function on a GPU
    >>> scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]], device="cuda" if torch.cuda.is_available() else "cpu")
    >>> selection.select_n_of_m(scores, 2, 4).tolist()
    [[True, False, True, False]]
    """
    values = values.contiguous()
    kept = torch.empty_like(values, dtype=torch.bool)
    rows, inputs = values.shape
    factors = inputs if factor is None else len(factor)
    padded = triton.next_power_of_2(m)
    groups = max(min(triton.next_power_of_2(inputs // m), 2048 // padded), 1)  # per program
    sizes = {"M": m, "PADDED": padded, "GROUPS": groups, "num_warps": max(groups * padded // 1024, 1)}
    grid = (rows, triton.cdiv(inputs // m, groups))
    with torch.cuda.device_of(values):
        _groups_kernel[grid](values, factor, kept, m - n, factors, inputs, **sizes)
    return kept
