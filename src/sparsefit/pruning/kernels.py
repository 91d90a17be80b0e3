"""Triton kernels for the steps of pruning that a GPU would spend on launches and temporaries.

Each does what tensor operations beside it do too (`selection`, `reconstruction`, `refinement`); those serve every other
device, are what the kernels are tested against, and take over where Triton is missing or cannot compile. This module
can be imported without Triton.

Scores are compared as whole numbers: the bits of a float32, with all but the sign of negative ones turned over, have
the order of the floats. With the column in the lower half of 64 bits no two scores are equal, and the lowest column
of equal scores comes first.
"""
# ruff: noqa: ANN001, ANN202, SIM102, SIM108 (Triton's language: no annotation but tl.constexpr, plain branches on one)

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import gcd, isqrt
from warnings import warn

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # the CPU builds of torch come without it
    triton = None

WIDEST_ROW = 2**16  # scores of a row that the registers of one program hold
WIDEST_GROUP = 64  # M, likewise
WIDEST_SEARCH = 2**15  # inputs of a row whose pairs one program searches
WIDEST_BLOCK = 128  # columns of a sweep
BLOCK = 8192  # scores of a long row for one program
LONGEST_ROW = 2**31 - 2 * BLOCK  # its columns are counted in 32 bits
SAMPLE = 8192  # scores that show where the threshold of a long row lies
PASSES, BINS = 4, 2048  # that close in on it: 11 bits of 32 each, and one more if the sample misled
LINE = 16 + PASSES * (BINS + 1)  # numbers kept for a long row: a range for each pass, the counts of each, what is below


# Numbers that differ from call to call; kernels are not to be compiled anew for multiples of 16.
COUNTS = ["count", "low_rank", "high_rank", "number", "step", "removed", "removed_of_group"]


def _jit(function):
    return triton.jit(function, do_not_specialize=COUNTS) if triton else function


@cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU with a Triton that can compile for it. Tried once for each.

    >>> available(torch.device("cpu"))
    False
    """
    if triton is None or device.type != "cuda":
        return False
    try:
        n_of_m(torch.ones(1, 4, device=device), None, 2, 4, magnitude=True)
    except Exception as error:  # no C compiler, a GPU that is too old, ...: Triton has no common class for these
        warn(f"Triton does not work on {device} ({error}); slower tensor operations are used", stacklevel=2)
        return False
    return True


@_jit
def _ordered(values, factor, places, columns, inside, MAGNITUDE: tl.constexpr, SCALED: tl.constexpr):
    """Whole numbers in the order of the scores |value| * factor, or of the values themselves."""
    scores = tl.load(values + places, mask=inside, other=0).to(tl.float32)
    if MAGNITUDE:
        scores = tl.abs(scores)
    if SCALED:
        scores = scores * tl.load(factor + columns, mask=inside, other=0)
    bits = tl.where(scores == 0, 0, scores.to(tl.int32, bitcast=True))  # -0.0 equals 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@_jit
def _bisected(scores, low, high, count):
    """The count-th smallest of scores from low to high; or a number that has as many at and below it, found sooner."""
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        reached = tl.sum((scores <= middle).to(tl.int32))
        low = tl.where(reached < count, middle + 1, tl.where(reached == count, middle, low))
        high = tl.where(reached < count, high, middle)
    return high


@_jit
def _rows_kernel(
    values, factor, kept, count, width, inputs,
    MAGNITUDE: tl.constexpr, SCALED: tl.constexpr, REPEATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mask of one row."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    scores = _ordered(values, factor, place, column % inputs if REPEATED else column, inside, MAGNITUDE, SCALED)
    low = tl.min(tl.where(inside, scores, 0x7FFFFFFF))
    high = tl.max(tl.where(inside, scores, low))
    scores = tl.where(inside, scores, 0x7FFFFFFF)  # behind all of them
    threshold = _bisected(scores, low, high, count)
    stays = scores > threshold
    surplus = tl.sum((scores <= threshold).to(tl.int32)) - count
    if surplus > 0:  # the last of the scores at the threshold stay
        tied = scores == threshold
        rank = tl.cumsum(tied.to(tl.int32), 0)
        stays = stays | (tied & (rank > tl.sum(tied.to(tl.int32)) - surplus))
    tl.store(kept + place, stays, mask=inside)


def mask_of_smallest(values: Tensor, factor: Tensor | None, count: int, magnitude: bool) -> Tensor:
    """Mask that removes the `count` smallest scores of each row; ties go to the lowest column.

    Rows of up to `WIDEST_ROW` scores are each read once. Longer ones are read four times: a sample gives two numbers
    with the threshold between them, as a rule; counts of the scores there, in bins that grow narrower, give the
    threshold itself; and counts of its ties in each piece of the row say in which the last one goes.

    Args:
        values: (rows, columns), any floating dtype; they are compared in float32.
        factor: (in,) float32, the scores' factors; repeated along rows of several times as many columns.
        count: how many of each row to remove, 0 < count < columns.
        magnitude: whether the scores are |value| * factor, rather than value * factor.

    Returns:
        (rows, columns) bool, True = kept.

    >>> mask_of_smallest(torch.tensor([[3.0, 1.0, 2.0]], device="cuda"), None, 1, True).tolist()  # doctest: +SKIP
    [[True, False, True]]
    """
    values = values.contiguous()
    kept = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    rows, width = values.shape
    if not rows:
        return kept
    inputs = width if factor is None else len(factor)
    source = (values, values if factor is None else factor.contiguous())
    flags = {"MAGNITUDE": magnitude, "SCALED": factor is not None}
    with _on(values.device):
        if width > WIDEST_ROW:
            _mask_long_rows(source, kept, count, inputs, flags)
        else:
            block = max(triton.next_power_of_2(width), 16)
            sizes = {"REPEATED": width != inputs, "BLOCK": block, "num_warps": _warps(block, 1024)}
            _rows_kernel[(rows,)](*source, kept, count, width, inputs, **flags, **sizes)
    return kept


def _mask_long_rows(source: tuple[Tensor, Tensor], kept: Tensor, count: int, inputs: int, flags: dict) -> None:
    rows, width = kept.shape
    # Every so-manieth score, and all inputs evenly. The rank of the threshold in a random sample of n has a standard
    # deviation of at most sqrt(n) / 2; six of them are left on either side.
    step = max(width // SAMPLE, 1)
    while gcd(step, inputs) > 1:
        step += 1
    number = min(-(-width // step), SAMPLE)
    middle, margin = count * number // width, 3 * (isqrt(number) + 1)
    pieces = triton.cdiv(width, BLOCK)
    lines = torch.zeros(rows, LINE, dtype=torch.int32, device=kept.device)
    ties = torch.empty(rows, pieces, dtype=torch.int32, device=kept.device)
    sizes = {"LAST": PASSES, "BINS": BINS, "LINE": LINE, "BLOCK": BLOCK, "num_warps": 8}
    _sample_kernel[(rows,)](
        *source, lines, middle - margin, middle + margin, number, step, width, inputs, **flags,
        LINE=LINE, BLOCK=triton.next_power_of_2(SAMPLE), num_warps=8,
    )  # fmt: skip
    for done in range(PASSES):
        _count_kernel[(rows, pieces)](*source, lines, count, width, inputs, **flags, DONE=done, **sizes)
    _ties_kernel[(rows, pieces)](*source, lines, ties, count, width, inputs, **flags, **sizes)
    _split_kernel[(rows, pieces)](*source, lines, ties, kept, count, width, inputs, **flags, **sizes)


@_jit
def _sample_kernel(
    values, factor, lines, low_rank, high_rank, number, step, width, inputs,
    MAGNITUDE: tl.constexpr, SCALED: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A first range for the threshold of a long row: between two ranks of its sample."""
    row = tl.program_id(0).to(tl.int64)
    sample = tl.arange(0, BLOCK)
    column = sample * step
    inside = sample < number
    scores = _ordered(values, factor, row * width + column, column % inputs, inside, MAGNITUDE, SCALED)
    least = tl.min(tl.where(inside, scores, 0x7FFFFFFF))
    most = tl.max(tl.where(inside, scores, least))
    scores = tl.where(inside, scores, 0x7FFFFFFF)
    low, high = least * 0 - 0x7FFFFFFF - 1, most * 0 + 0x7FFFFFFF
    if low_rank > 0:
        low = _bisected(scores, least, most, low_rank)
    if high_rank <= number:
        high = _bisected(scores, least, most, high_rank)
    tl.store(lines + row * LINE, low)
    tl.store(lines + row * LINE + 1, high)


@_jit
def _bin(score, low, shift):
    """In which bin a score of the range from low on lies; the range can be as wide as 32 bits without a sign."""
    return ((score - low).to(tl.uint32, bitcast=True) >> shift).to(tl.int32)


@_jit
def _shift(low, high, BINS: tl.constexpr):
    """How many bits of a score's distance from low its bin ignores."""
    span = (high - low).to(tl.uint32, bitcast=True)
    shift = span * 0
    while (span >> shift) >= BINS:
        shift += 1
    return shift


@_jit
def _range_after(line, DONE: tl.constexpr, count, LAST: tl.constexpr, BINS: tl.constexpr):
    """The range of a long row that holds its threshold once DONE passes have counted, and the scores below it."""
    before = DONE - 1 if DONE > 0 else 0
    low, high, below = tl.load(line + 3 * before), tl.load(line + 3 * before + 1), tl.load(line + 3 * before + 2)
    if DONE > 0:
        unsettled = low < high
        if DONE == 1:
            unsettled = low <= high  # the sample's range may be a wrong one even where it is a single number
        if unsettled:
            counts = line + 16 + before * (BINS + 1)
            if DONE == 1:
                below = tl.load(counts + BINS)
            place = tl.arange(0, BINS)
            number = tl.load(counts + place)
            total, due = tl.sum(number), count - below
            first = tl.sum((tl.cumsum(number, 0) < due).to(tl.int32))
            lower = tl.sum(tl.where(place < first, number, 0))
            shift = _shift(low, high, BINS)
            start = first.to(tl.uint32) << shift
            end = start | ((start * 0 + 1 << shift) - 1)
            end = tl.minimum(end, (high - low).to(tl.uint32, bitcast=True))
            if due <= 0:  # the sample misled: the threshold lies below its range
                high, low, below = low - 1, low * 0 - 0x7FFFFFFF - 1, below * 0
            elif due > total:  # or above
                low, high, below = high + 1, high * 0 + 0x7FFFFFFF, below + total
            else:
                high, low, below = (
                    low + end.to(tl.int32, bitcast=True),
                    low + start.to(tl.int32, bitcast=True),
                    below + lower,
                )
    return low, high, below


@_jit
def _count_kernel(
    values, factor, lines, count, width, inputs,
    MAGNITUDE: tl.constexpr, SCALED: tl.constexpr, DONE: tl.constexpr, LAST: tl.constexpr, BINS: tl.constexpr,
    LINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the scores of a piece of a long row by the bins of the range that holds the threshold."""
    row = tl.program_id(0).to(tl.int64)
    line = lines + row * LINE
    low, high, below = _range_after(line, DONE, count, LAST, BINS)
    if tl.program_id(1) == 0:
        tl.store(line + 3 * DONE, low)
        tl.store(line + 3 * DONE + 1, high)
        tl.store(line + 3 * DONE + 2, below)
    unsettled = low < high
    if DONE == 0:
        unsettled = low <= high
    if unsettled:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        scores = _ordered(values, factor, row * width + column, column % inputs, inside, MAGNITUDE, SCALED)
        counts = line + 16 + DONE * (BINS + 1)
        shift = _shift(low, high, BINS)
        # Relaxed: only the next kernel reads the counts, and fences around each addition would take most of the time.
        if DONE == 0:
            tl.atomic_add(counts + BINS, tl.sum((inside & (scores < low)).to(tl.int32)), sem="relaxed")
        # Scores that many weights share are the range's ends, as a rule. They are added up here first.
        tl.atomic_add(counts, tl.sum((inside & (scores == low)).to(tl.int32)), sem="relaxed")
        if low < high:
            at_end = tl.sum((inside & (scores == high)).to(tl.int32))
            tl.atomic_add(counts + _bin(high, low, shift), at_end, sem="relaxed")
        within = inside & (scores > low) & (scores < high)
        tl.atomic_add(counts + _bin(scores, low, shift), tl.where(within, 1, 0), mask=within, sem="relaxed")


@_jit
def _ties_kernel(
    values, factor, lines, ties, count, width, inputs,
    MAGNITUDE: tl.constexpr, SCALED: tl.constexpr, LAST: tl.constexpr, BINS: tl.constexpr, LINE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the scores at the threshold in a piece of a long row."""
    row = tl.program_id(0).to(tl.int64)
    threshold, _, _ = _range_after(lines + row * LINE, LAST, count, LAST, BINS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    scores = _ordered(values, factor, row * width + column, column % inputs, inside, MAGNITUDE, SCALED)
    number = tl.sum((inside & (scores == threshold)).to(tl.int32))
    tl.store(ties + row * tl.num_programs(1) + tl.program_id(1), number)


@_jit
def _split_kernel(
    values, factor, lines, ties, kept, count, width, inputs,
    MAGNITUDE: tl.constexpr, SCALED: tl.constexpr, LAST: tl.constexpr, BINS: tl.constexpr, LINE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The mask of a piece of a long row: of the scores at the threshold those go that come first."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    threshold, _, below = _range_after(lines + row * LINE, LAST, count, LAST, BINS)
    ties += row * tl.num_programs(1)
    due = count - below
    for start in range(0, piece, 1024):
        other = start + tl.arange(0, 1024)
        due -= tl.sum(tl.load(ties + other, mask=other < piece, other=0))
    column = piece * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    scores = _ordered(values, factor, row * width + column, column % inputs, inside, MAGNITUDE, SCALED)
    stays = scores > threshold
    if tl.load(ties + piece) > due:  # not all of this piece's go
        tied = scores == threshold
        stays = stays | (tied & (tl.cumsum((tied & inside).to(tl.int32), 0) > due))
    tl.store(kept + row * width + column, stays, mask=inside)


@_jit
def _groups_kernel(
    values, factor, kept, inputs, removed,
    MAGNITUDE: tl.constexpr, SCALED: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Some groups of M inputs of one row: a weight stays if at least `removed` of its group go before it."""
    first = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)) * M
    member = tl.arange(0, PADDED)[None, :]
    column = first[:, None] + member
    inside = (member < M) & (column < inputs)
    place = tl.program_id(0).to(tl.int64) * inputs + column
    scores = _ordered(values, factor, place, column, inside, MAGNITUDE, SCALED)
    rank = tl.zeros([GROUPS, PADDED], tl.int32)
    for other in tl.static_range(M):
        one = tl.sum(tl.where(member == other, scores, 0), axis=1)[:, None]
        rank += ((one < scores) | ((one == scores) & (member > other))).to(tl.int32)
    tl.store(kept + place, rank >= removed, mask=inside)


def n_of_m(values: Tensor, factor: Tensor | None, n: int, m: int, magnitude: bool) -> Tensor:
    """In each group of m <= `WIDEST_GROUP` consecutive columns of a row, the m - n smallest scores go; of equal ones
    the lowest columns.

    Args:
        values: (out, in), any floating dtype, m a divisor of in; they are compared in float32.
        factor: (in,) float32, the scores' factors.
        n: how many of a group stay.
        m: the size of a group.
        magnitude: whether the scores are |value| * factor, rather than value * factor.

    Returns:
        (out, in) bool, True = kept.

    >>> n_of_m(torch.tensor([[3.0, 1.0, 2.0, 0.0]], device="cuda"), None, 2, 4, True).tolist()  # doctest: +SKIP
    [[True, False, True, False]]
    """
    values = values.contiguous()
    kept = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    if kept.numel():
        rows, inputs = values.shape
        padded = triton.next_power_of_2(m)
        groups = max(min(triton.next_power_of_2(inputs // m), 2048 // padded), 1)
        source = (values, values if factor is None else factor.contiguous())
        flags = {"MAGNITUDE": magnitude, "SCALED": factor is not None}
        sizes = {"M": m, "PADDED": padded, "GROUPS": groups, "num_warps": _warps(groups * padded, 1024)}
        grid = (rows, triton.cdiv(inputs // m, groups))
        with _on(values.device):
            _groups_kernel[grid](*source, kept, inputs, m - n, **flags, **sizes)
    return kept


@_jit
def _sweep_kernel(
    work, kept, errors, upper, rows, inputs, width, removed_of_group,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The first `width` columns of some rows, one after the other; with a GROUP their masks, too, as they come."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    place = row.to(tl.int64) * inputs + column
    weight = tl.load(work + place, mask=inside, other=0)
    error = tl.zeros([ROWS, BLOCK], tl.float32)
    if GROUP == 0:
        goes = tl.load(kept + place, mask=inside, other=1) == 0
    else:
        goes = tl.zeros([ROWS, BLOCK], tl.int32) > 0
    diagonal = tl.load(upper + column * (inputs + 1), mask=column < width, other=1)
    for j in range(width):
        if GROUP > 0:
            if j % GROUP == 0:
                score = tl.div_rn(weight * weight, diagonal * diagonal + tl.zeros([ROWS, BLOCK], tl.float32))
                rank = tl.zeros([ROWS, BLOCK], tl.int32)
                for other in tl.static_range(GROUP):
                    one = tl.sum(tl.where(column == j + other, score, 0), axis=1)[:, None]
                    rank += ((one < score) | ((one == score) & (column > j + other))).to(tl.int32)
                goes = goes | ((column >= j) & (column < j + GROUP) & (rank < removed_of_group))
        unit = tl.load(upper + j * inputs + column, mask=(column >= j) & (column < width), other=0)
        pivot = tl.sum(tl.where(column == j, unit, 0), axis=1)
        lost = tl.sum(tl.where((column == j) & goes, weight, 0), axis=1)
        lost = tl.div_rn(lost, pivot + tl.zeros([ROWS], tl.float32))[:, None]
        error = tl.where(column == j, lost, error)
        weight -= lost * tl.where(column > j, unit, 0)
    tl.store(work + place, tl.where(goes, 0, weight), mask=inside)
    tl.store(errors + row.to(tl.int64) * width + column, error, mask=inside)
    if GROUP > 0:
        tl.store(kept + place, goes == 0, mask=inside)


def sweep_block(
    work: Tensor, kept: Tensor, upper: Tensor, columns: slice, pattern: tuple[int, int] | None = None
) -> Tensor:
    """Prune some columns one after the other; those behind, among these, make up for each. In place.

    Args:
        work: (out, in) float32, contiguous: the weights. Those of the columns are changed, exactly zero where pruned.
        kept: (out, in) bool, contiguous: the mask of these columns; with a pattern it is filled in.
        upper: (in, in) float32, contiguous: of `reconstruction.Factor`.
        columns: at most `WIDEST_BLOCK`.
        pattern: (N, M): of every M columns the N with the largest SparseGPT score stay, chosen as they come.

    Returns:
        (out, columns) float32: what each pruned weight asks of the columns behind, a multiple of a row of `upper`.

    >>> work, kept = torch.ones(1, 1, device="cuda"), torch.zeros(1, 1, dtype=bool, device="cuda")  # doctest: +SKIP
    >>> sweep_block(work, kept, 2 * torch.ones(1, 1, device="cuda"), slice(0, 1)).tolist()  # doctest: +SKIP
    [[0.5]]
    """
    rows, inputs = work.shape
    width = columns.stop - columns.start
    errors = torch.empty(rows, width, dtype=torch.float32, device=work.device)
    n, m = pattern or (0, 0)
    sizes = {"GROUP": m, "BLOCK": max(triton.next_power_of_2(width), 16), "ROWS": 16, "num_warps": 8}
    block = (work[:, columns], kept[:, columns], errors, upper[columns, columns])
    with _on(work.device):
        _sweep_kernel[(triton.cdiv(rows, 16),)](*block, rows, inputs, width, m - n, **sizes)
    return errors


@_jit
def _pair_kernel(
    gain, loss, weight, length, reach, gram, added, removed, inputs,
    GRID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    """The pruned and the kept weight of each row whose swap changes the error most favourably: the arguments of
    `refinement._best_pair`, of up to `WIDEST_SEARCH` inputs.

    A program has a row to itself and tries one pruned weight at a time with all partners, in the order of their
    bounds, until no bound of those left is below the best change found, or below zero. What takes the time is reading
    a row of the Gram matrix for each: the more the inputs are correlated, the more are read.

    Returns:
        (rows,) indices each; any pair where no swap lowers the error.

    >>> gain, loss = torch.tensor([[-3.0, torch.inf], [torch.inf, 1.0]], device="cuda")[:, None]  # doctest: +SKIP
    >>> best_pair(gain, loss, loss, torch.eye(2, device="cuda"), gain[0], 16)  # doctest: +SKIP
    (tensor([0], device='cuda:0'), tensor([1], device='cuda:0'))
    """
    rows, inputs = gain.shape
    added, removed = torch.zeros(2, rows, dtype=torch.long, device=gain.device).unbind()
    block = max(triton.next_power_of_2(inputs), 16)
    sizes = {"GRID": grid, "BLOCK": block, "num_warps": _warps(block, 512)}
    if rows:
        columns = (gram.diagonal().sqrt(), reach)
        with _on(gain.device):
            _pair_kernel[(rows,)](gain, loss, weight, *columns, gram, added, removed, inputs, **sizes)
    return added, removed


def _warps(elements: int, each: int) -> int:
    """Warps of a program, so many elements to each of them."""
    return max(1, min(32, triton.next_power_of_2(triton.cdiv(elements, each))))


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current GPU, which need not be that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
