"""New values for the weights that are kept. Pure functions of weights, masks and the Gram matrix of the inputs.

A layer's error is ||(W' - W) X||_F^2 over the calibration tokens. It falls apart into rows, one for each output,
and needs nothing of X but its Gram matrix G = X X^T: a row's error is (w' - w) G (w' - w)^T. Nothing here changes
when G is multiplied by a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefit.errors import CalibrationError
from sparsefit.pruning.selection import kernels_for, select_n_of_m

# G is accumulated in float32. Where less than this share of an input's power is independent of the other inputs,
# what is left is rounding noise, and dividing by it makes weights that fit nothing but the noise.
RESOLUTION = torch.finfo(torch.float32).eps
FIRST_DAMPING = 1e-6  # tried where no damping at all was asked for and that fails
TEMPORARY_BYTES = 256 * 2**20

DIRECT_WORK = 5e11  # multiply-adds of a GPU's factorisations, a second or so; above it all rows are solved together
ROWS_TOGETHER = 4096
STRONG_DIRECTIONS = 64  # of a Gram matrix, that the approximate inverse of its kept parts takes as they are
ITERATIONS = 50
ENOUGH = 2e-3  # the share of its error that an iteration must take from some row for another one to follow

Choose = Callable[[Tensor, slice, Tensor], Tensor]


class Factor(NamedTuple):
    """The inverse of a damped Gram matrix, factored for updates column by column.

    Attributes:
        upper: (in, in) float32, upper triangular, with (G + damping)^-1 = upper^T upper. Its row j, divided by its
            diagonal element, is what one unit of error in column j asks of the later columns.
        damping: the damping that worked, as a share of the mean of diag(G).
        dead: (in,) bool, inputs that were zero in every token.
    """

    upper: Tensor
    damping: float
    dead: Tensor


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Factor:
    """Upper Cholesky factor of (G + damping * mean(diag G) I)^-1 (SparseGPT, arXiv 2301.00774, Section 3.3).

    Dead inputs get a one on the diagonal (in units of the mean). Where the factorisation fails, or leaves nothing
    but rounding noise of some input, the damping is raised tenfold until it works: compare `Factor.damping` with
    what was asked for. With a damping of 0.01 that needs a matrix that is no Gram matrix, or is badly damaged.

    The factor comes from one Cholesky factorisation of G with its inputs in reverse order and one triangular
    inverse, about in^3 multiply-adds and four (in, in) matrices in `precise_dtype`; G^-1 itself is never formed.

    Args:
        gram: (in, in), G = sum of x x^T over tokens, any positive factor.
        damping: share of the mean of diag(G).

    Raises:
        CalibrationError: if the Gram matrix is not finite.

    >>> inverse_factor(torch.diag(torch.tensor([4.0, 4.0])), damping=0.0).upper
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    system, scale, dead = _unit_gram(gram)
    reverse = system.flip(0, 1)
    diagonal = reverse.diagonal().clone()
    while True:
        reverse.diagonal().copy_(diagonal + damping)
        lower, works = _cholesky(reverse)
        if works:
            # With P G P = L L^T, where P reverses the inputs, G^-1 = (P L^-1 P)^T (P L^-1 P), upper triangular.
            identity = torch.eye(len(gram), dtype=lower.dtype, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            return Factor((upper / scale.sqrt()).float(), damping, dead)
        damping = _next_damping(damping)


def inverse_diagonal(factor: Factor) -> Tensor:
    """diag((G + damping)^-1), (in,) float32, for the score W^2 / diag(H^-1) of SparseGPT.

    Infinite for dead inputs: their weights cost nothing, and so score zero.

    >>> inverse_diagonal(inverse_factor(torch.diag(torch.tensor([4.0, 0.0])), damping=0.0))
    tensor([0.2500,    inf])
    """
    return torch.linalg.vector_norm(factor.upper, dim=0).square().masked_fill_(factor.dead, torch.inf)


def update_sequentially(weight: Tensor, mask: Tensor, factor: Factor, block_size: int = 128) -> Tensor:
    """Prune column by column; the kept weights of the later columns make up for each (arXiv 2301.00774, Section 3).

    The optimal brain surgeon update, in SparseGPT's order, for masks that are chosen already. Costs out * in^2
    multiply-adds. Weights of dead inputs stay as they are: nothing is known of them.

    Args:
        weight: (out, in), any floating dtype, dense.
        mask: (out, in) bool, True = kept.
        factor: of `inverse_factor`.
        block_size: columns whose effect on all later ones is applied at once; changes the speed, not the result.

    Returns:
        (out, in) float32, exactly zero outside the mask.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # the second weight makes up for the first
    >>> update_sequentially(torch.ones(1, 2), torch.tensor([[False, True]]), inverse_factor(gram, damping=0.0))
    tensor([[0.0000, 1.5000]])
    """

    def given(_: Tensor, columns: slice, __: Tensor) -> Tensor:
        return mask[:, columns]

    kernels = kernels_for(weight)
    if kernels is not None:
        width = min(block_size, kernels.WIDEST_BLOCK)
        return _sweep_by_kernel(kernels, weight.float(), factor.upper, width, choose=given)[1]
    return _sweep(weight.float(), factor.upper, given, block_size, None)[1]


def prune_iteratively(
    weight: Tensor, factor: Factor, choose: Choose, block_size: int = 128, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """SparseGPT's loop: masks are chosen block by block, on weights that made up for all columns before
    (arXiv 2301.00774, Algorithm 1). Weights of dead inputs are set to zero first.

    Args:
        weight: (out, in), any floating dtype, dense.
        factor: of `inverse_factor`.
        choose: `choose(weights (out, b), columns, diagonal of factor.upper (b,))` returns (out, b) bool,
            True = kept. The score of SparseGPT is `(weights / diagonal) ** 2`.
        block_size: b, the columns of which weights compete; the last block may be narrower.
        group: M, to choose in every M columns instead (N:M sparsity), as they come. Blocks are then the largest
            multiple of M within block_size.

    Returns:
        (out, in) bool mask and (out, in) float32 weights, exactly zero outside it.

    Raises:
        ValueError: if the group does not divide the number of inputs.

    >>> def choose(weights, columns, diagonal):
    ...     return weights.abs() > 1
    >>> prune_iteratively(torch.tensor([[1.0, 2.0]]), inverse_factor(torch.eye(2)), choose)
    (tensor([[False,  True]]), tensor([[0., 2.]]))
    """
    live = weight.float().masked_fill(factor.dead, 0)
    if group is not None:
        return _sweep(live, factor.upper, choose, _whole_groups(weight.shape[1], group, block_size), group)
    kernels = kernels_for(weight)
    if kernels is not None and block_size <= kernels.WIDEST_BLOCK:
        return _sweep_by_kernel(kernels, live, factor.upper, block_size, choose=choose)
    return _sweep(live, factor.upper, choose, block_size, None)


def prune_n_of_m(weight: Tensor, factor: Factor, n: int, m: int, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """`prune_iteratively` to N:M by SparseGPT's own score, w^2 / diagonal^2: on a GPU without leaving its kernel.

    Args:
        weight: (out, in), any floating dtype, dense.
        factor: of `inverse_factor`.
        n: how many of every m consecutive weights of a row stay.
        m: the size of a group.
        block_size: columns whose effect on all later ones is applied at once; changes the speed, not the result.

    Returns:
        (out, in) bool mask and (out, in) float32 weights, exactly zero outside it.

    Raises:
        ValueError: if m does not divide the number of inputs.

    >>> prune_n_of_m(torch.tensor([[1.0, 2.0]]), inverse_factor(torch.eye(2)), 1, 2)
    (tensor([[False,  True]]), tensor([[0., 2.]]))
    """
    block_size = _whole_groups(weight.shape[1], m, block_size)
    kernels = kernels_for(weight)
    if kernels is not None and m <= kernels.WIDEST_GROUP and block_size <= kernels.WIDEST_BLOCK:
        live = weight.float().masked_fill(factor.dead, 0)
        return _sweep_by_kernel(kernels, live, factor.upper, block_size, pattern=(n, m))

    def choose(weights: Tensor, _: slice, diagonal: Tensor) -> Tensor:
        return select_n_of_m(weights.square().div_(diagonal.square()), n, m)

    return prune_iteratively(weight, factor, choose, block_size, m)


def _whole_groups(inputs: int, group: int, block_size: int) -> int:
    """The widest block of whole groups within a block size."""
    if inputs % group:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {group}")
    return max(block_size // group, 1) * group


def _sweep_by_kernel(
    kernels: ModuleType,
    weight: Tensor,
    upper: Tensor,
    block_size: int,
    choose: Choose | None = None,
    pattern: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `_sweep`, on a GPU, whose launches would take longer than the columns."""
    work, upper = weight.clone(memory_format=torch.contiguous_format), upper.contiguous()
    kept = torch.empty_like(work, dtype=torch.bool)
    diagonal = upper.diagonal()
    inputs = work.shape[1]
    for start in range(0, inputs, block_size):
        columns = slice(start, min(start + block_size, inputs))
        if choose is not None:
            kept[:, columns] = choose(work[:, columns].contiguous(), columns, diagonal[columns])
        errors = kernels.sweep_block(work, kept, upper, columns, pattern)
        work[:, columns.stop :].addmm_(errors, upper[columns, columns.stop :], alpha=-1)
    return kept, work


def _sweep(weight: Tensor, upper: Tensor, choose: Choose, block_size: int, group: int | None) -> tuple[Tensor, Tensor]:
    work = weight.t().clone(memory_format=torch.contiguous_format)  # (in, out): each column of weights in one piece
    kept = torch.empty_like(work, dtype=torch.bool)
    diagonal = upper.diagonal()
    for start in range(0, len(work), block_size):
        end = min(start + block_size, len(work))
        width = group or end - start
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            if (j - start) % width == 0:
                columns = slice(j, j + width)
                kept[columns] = choose(work[columns].t().contiguous(), columns, diagonal[columns]).t()
            error = errors[j - start]
            torch.div(work[j].masked_fill(kept[j], 0), diagonal[j], out=error)
            work[j].masked_fill_(~kept[j], 0)
            work[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        work[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return kept.t().contiguous(), work.t().contiguous()


def least_squares(weight: Tensor, mask: Tensor, gram: Tensor, damping: float = 0.0) -> tuple[Tensor, float]:
    """The kept weights of each row that minimise its error, exactly: G_KK w'_K = (G w)_K for the kept set K.

    Solved for the change u = w'_K - w_K: (G_KK + damping I) u = (G d)_K, where d holds the row's pruned weights.
    Damping so pulls towards the original weights, and weights of dead inputs stay as they are. A row that rounding
    left worse than its masked original keeps the original.

    Costs kept^3 / 6 multiply-adds for each row, which needs a factorisation of its own: at half the weights, 0.3 ms
    a row of 192 inputs and 0.25 s a row of 4,096 on one CPU core. The 4,096 rows of such a layer are 6e12
    multiply-adds in `precise_dtype`, 90 times those of `update_sequentially`. A GPU solves layers of so many all
    rows together, by conjugate gradients: about ten matrix products of the weights' and the Gram matrix's shapes
    leave the error within 1% of the lowest.

    Args:
        weight: (out, in), any floating dtype, dense.
        mask: (out, in) bool, True = kept; rows may keep different numbers of weights.
        gram: (in, in).
        damping: share of the mean of diag(G). Rows where it does not work take ten times as much, and so on.

    Returns:
        (out, in) float32, exactly zero outside the mask, and the largest damping that a row took.

    Raises:
        CalibrationError: if the Gram matrix is not finite.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> least_squares(torch.ones(1, 2), torch.tensor([[False, True]]), gram)
    (tensor([[0.0000, 1.5000]]), 0.0)
    """
    system, _, _ = _unit_gram(gram)
    kept_counts = mask.sum(dim=1).tolist()
    if gram.device.type == "cuda" and sum(count**3 for count in kept_counts) / 6 > DIRECT_WORK:
        return _least_squares_together(weight, mask, system, damping), damping
    original = weight.to(system.dtype)
    changed = torch.where(mask, weight.float(), 0)
    largest = damping
    start = 0
    while start < len(weight):
        end = _last_row_that_fits(kept_counts, start, system.element_size())
        rows = slice(start, end)
        places, valid = _kept_places(mask[rows], max(kept_counts[rows]))  # (rows, kept)
        pruned = original[rows].masked_fill(mask[rows], 0)
        gradient = (pruned @ system).gather(1, places).masked_fill_(~valid, 0)
        change, used = _solve(_kept_systems(system, places, valid), gradient, damping)
        candidate = original[rows].scatter_add(1, places, change).masked_fill_(~mask[rows], 0).float()
        better = _error(original[rows], candidate, system) < _error(original[rows], changed[rows], system)
        changed[rows] = torch.where(better[:, None], candidate, changed[rows])
        largest = max(largest, used)
        start = end
    return changed, largest


def _least_squares_together(weight: Tensor, mask: Tensor, system: Tensor, damping: float) -> Tensor:
    """`least_squares` of all rows at once, by preconditioned conjugate gradients.

    With inputs scaled to a diagonal of one, a Gram matrix is close to F F^T + D, with a diagonal D and a factor F of
    few columns for its strongest directions: that holds for the kept part of each row, too, and is inverted with
    matrices of the size of F's columns (Woodbury's identity). What is left to the iterations is conditioned so well
    that about ten of them do, in float32; `precise_dtype` has the right sides and decides in the end.
    """
    scale = (system.diagonal() + damping).sqrt()
    matrix = system / scale / scale[:, None]
    matrix.diagonal().fill_(1)
    matrix = matrix.float()
    strong = _strong_directions(matrix)
    changed = torch.where(mask, weight.float(), 0)
    for start in range(0, len(weight), ROWS_TOGETHER):
        rows = slice(start, start + ROWS_TOGETHER)
        original, kept = weight[rows].to(system.dtype), mask[rows]
        pruned = original.masked_fill(kept, 0)
        gradient = pruned @ system
        before = (gradient * pruned).sum(dim=1)
        change = _conjugate_gradients(matrix, strong, kept.float(), (gradient / scale).float(), before.float())
        candidate = (original + change / scale).masked_fill_(~kept, 0).float()
        better = _error(original, candidate, system) < before  # not so for NaN
        changed[rows] = torch.where(better[:, None], candidate, changed[rows])
    return changed


def _conjugate_gradients(matrix: Tensor, strong: Tensor, kept: Tensor, right: Tensor, error: Tensor) -> Tensor:
    """Solves matrix_KK u = right_K for each of (rows, in), until no row's (rows,) error falls by much any more."""
    approximate_inverse = _approximate_inverse(strong, kept)
    solution, residual, left = torch.zeros_like(right), right * kept, error.clone()
    preconditioned = approximate_inverse(residual)
    direction, product = preconditioned, (residual * preconditioned).sum(dim=1, keepdim=True)
    for _ in range(ITERATIONS):
        moved = (direction @ matrix).mul_(kept)
        step = _share(product, (direction * moved).sum(dim=1, keepdim=True))
        solution.addcmul_(step, direction)
        change = step * moved
        residual = residual - change
        gained = (step * product).squeeze(1)
        left = left - gained
        if bool((gained <= ENOUGH * left.clamp_min(1e-6 * error)).all()):
            break
        preconditioned = approximate_inverse(residual)
        # Polak and Ribiere's form: rounding in the approximate inverse does not turn the directions into wrong ones.
        turned = -(change * preconditioned).sum(dim=1, keepdim=True)
        direction = preconditioned.addcmul(_share(turned, product), direction)
        product = (residual * preconditioned).sum(dim=1, keepdim=True)
    return solution


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and nothing of nothing: rows that are solved stand still."""
    return torch.where(whole > 0, part / whole, 0)


def _strong_directions(matrix: Tensor) -> Tensor:
    """F, (in, few), so that matrix is about F F^T plus a diagonal: a subspace iteration, the same in each run."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    shape = (len(matrix), min(STRONG_DIRECTIONS, len(matrix)))
    basis = torch.randn(shape, generator=generator, device=matrix.device)
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    return basis @ vectors * values.clamp_min(0).sqrt()


def _approximate_inverse(strong: Tensor, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of (rows, in) with the inverses of each row's kept part of F F^T + D, whose diagonal is one."""
    few = strong.shape[1]
    weights = kept / (1 - strong.square().sum(dim=1)).clamp_min_(1e-3)  # (rows, in)
    inner = weights @ (strong[:, :, None] * strong[:, None, :]).flatten(1)
    inner = inner.view(-1, few, few).to(precise_dtype(kept.device))
    inner.diagonal(dim1=1, dim2=2).add_(1)
    inverses = torch.linalg.inv(inner).float()

    def apply(rows: Tensor) -> Tensor:
        weighted = rows * weights
        common = torch.bmm(inverses, (weighted @ strong)[:, :, None]).squeeze(2)
        return weighted.addcmul_(common @ strong.T, weights, value=-1)

    return apply


def reconstruction_error(weight: Tensor, changed: Tensor, gram: Tensor) -> Tensor:
    """Squared error of each output over the calibration tokens: (w' - w) G (w' - w)^T, in `precise_dtype`.

    Args:
        weight: (out, in), the dense weights.
        changed: (out, in), what they became.
        gram: (in, in).

    Returns:
        (out,), not negative.

    >>> reconstruction_error(torch.ones(1, 2), torch.zeros(1, 2), torch.eye(2))
    tensor([2.], dtype=torch.float64)
    """
    dtype = precise_dtype(gram.device)
    return _error(weight.to(dtype), changed, gram.to(dtype))


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it. Apple's GPUs alone do not, and compute in float32.

    Gram matrices of real activations have condition numbers of 1e5 and more even when damped: factoring them in
    float32 keeps two or three digits. float64 costs twice the time on a CPU, against weights that are right.

    >>> precise_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _error(weight: Tensor, changed: Tensor, gram: Tensor) -> Tensor:
    difference = changed.to(weight.dtype) - weight
    return ((difference @ gram) * difference).sum(dim=1).clamp_min_(0)


def _unit_gram(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G in precise dtype with a mean diagonal of one and ones for dead inputs; the scale taken out; the dead inputs."""
    diagonal = gram.diagonal()
    dead = diagonal == 0
    scale = diagonal.to(precise_dtype(gram.device)).mean()
    scale = torch.where(scale > 0, scale, 1)
    unit = gram.to(scale.dtype) / scale
    if not unit.sum().isfinite():
        raise CalibrationError(
            "the Gram matrix of the inputs is not finite: some activations are infinite or NaN; "
            "load the model in bfloat16 or float32 instead of float16, and check the calibration data"
        )
    unit.diagonal()[dead] = 1
    return unit, scale, dead


def _cholesky(systems: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors of (..., n, n) systems, and whether each can be relied on: (...)."""
    lower, info = torch.linalg.cholesky_ex(systems)
    left = lower.diagonal(dim1=-2, dim2=-1).square()  # of each input's power, what the inputs before do not explain
    power = systems.diagonal(dim1=-2, dim2=-1)
    return lower, (info == 0) & (left > RESOLUTION * power).all(dim=-1)  # not so for NaN


def _next_damping(damping: float) -> float:
    return max(damping * 10, FIRST_DAMPING)


def _last_row_that_fits(kept_counts: list[int], start: int, element_size: int) -> int:
    """End of the longest run of rows from `start` whose systems stay within the memory for temporaries."""
    widest = 0
    for end in range(start, len(kept_counts)):
        widest = max(widest, kept_counts[end])
        if end > start and (end + 1 - start) * widest**2 * 3 * element_size > TEMPORARY_BYTES:
            return end
    return len(kept_counts)


def _kept_places(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns of the kept weights of each row, (rows, count), and which of them are no padding."""
    places = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    return places, mask.gather(1, places)


def _kept_systems(gram: Tensor, places: Tensor, valid: Tensor) -> Tensor:
    """G_KK of each row, (rows, kept, kept); identity at the padding."""
    systems = gram[places[:, :, None], places[:, None, :]]
    if not valid.all():
        systems.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), 0)
        systems.diagonal(dim1=1, dim2=2).masked_fill_(~valid, 1)
    return systems


def _solve(systems: Tensor, right: Tensor, damping: float) -> tuple[Tensor, float]:
    """Solves (rows, n, n) damped systems for (rows, n) right sides; the largest damping that a row took."""
    solution = torch.empty_like(right)
    pending = torch.arange(len(right), device=right.device)
    diagonal = systems.diagonal(dim1=1, dim2=2).clone()
    while True:
        systems.diagonal(dim1=1, dim2=2).copy_(diagonal + damping)
        lower, works = _cholesky(systems)
        if works.all():
            solution[pending] = _substitute(lower, right)
            return solution, damping
        solution[pending[works]] = _substitute(lower[works], right[works])
        systems, right, diagonal, pending = (part[~works] for part in (systems, right, diagonal, pending))
        damping = _next_damping(damping)


def _substitute(lower: Tensor, right: Tensor) -> Tensor:
    """Solves (L L^T) x = right for each of (rows, n). Many times faster than `torch.cholesky_solve` on a CPU."""
    half = torch.linalg.solve_triangular(lower, right[..., None], upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True).squeeze(-1)
