"""The values of the kept weights that minimise each output's error, from the Gram matrix G of the inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefit.pruning.gram import cholesky, next_damping, precise_dtype, reconstruction_error, unit_gram

TEMPORARY_BYTES = 256 * 2**20
DIRECT_WORK = 5e11  # multiply-adds of factorisations on a GPU (about a second); above it, conjugate gradients are used
ROWS_TOGETHER = 4096
STRONG_DIRECTIONS = 64  # leading directions of a Gram matrix: the columns of F in `_solve_together`
ITERATIONS = 50
ENOUGH = 2e-3  # iterate while one lowers the error of some row by more than this share


def least_squares(weight: Tensor, mask: Tensor, gram: Tensor, damping: float = 0.0) -> tuple[Tensor, float]:
    """The kept weights of each row that minimise its error, exactly: G_KK w'_K = (G w)_K for the kept set K; and the
    largest damping that a row needed. Takes dense weights, (out, in), of any floating dtype; returns float32.

    Solved for the change u = w'_K - w_K: (G_KK + damping I) u = (G d)_K, where d holds the row's pruned weights. So
    damping, a share of the mean of diag(G), pulls towards the original weights, and weights of dead inputs do not
    change. A row for which rounding gives a larger error than masking alone keeps its masked weights.

    Each row needs its own factorisation, kept^3 / 6 multiply-adds in `precise_dtype`: with half of 4,096 weights kept,
    0.25 s a row on one CPU core. A GPU solves the rows of large layers together, by conjugate gradients: about ten
    products of the weights and the Gram matrix bring the error within 1% of the minimum.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> least_squares(torch.ones(1, 2), torch.tensor([[False, True]]), gram)
    (tensor([[0.0000, 1.5000]]), 0.0)
    """
    system, _, _ = unit_gram(gram)
    counts = mask.sum(dim=1)
    if gram.device.type == "cuda" and float(counts.double().pow(3).sum()) / 6 > DIRECT_WORK:
        return _solve_together(weight, mask, system, damping), damping
    changed, largest = torch.where(mask, weight.float(), 0), damping
    at_once = max(TEMPORARY_BYTES // (3 * system.element_size() * max(int(counts.max()), 1) ** 2), 1)
    for rows in torch.arange(len(weight), device=weight.device).split(at_once):
        original, kept = weight[rows].to(system.dtype), mask[rows]
        systems, places, valid = _kept_systems(system, kept)
        gradient = (original.masked_fill(kept, 0) @ system).gather(1, places).masked_fill_(~valid, 0)
        change, used = _solve(systems, gradient, damping)
        _take_better(changed, rows, original, original.scatter_add(1, places, change).masked_fill_(~kept, 0), system)
        largest = max(largest, used)
    return changed, largest


def _take_better(changed: Tensor, rows: Tensor, original: Tensor, candidate: Tensor, system: Tensor) -> None:
    """Replace rows with their candidates where these lower the error (a NaN does not)."""
    before, after = (reconstruction_error(original, new, system) for new in (changed[rows], candidate.float()))
    changed[rows] = torch.where((after < before)[:, None], candidate.float(), changed[rows])


def _kept_systems(gram: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G_KK of each row, (rows, k, k), where k is the largest number of kept weights and padding is the identity; the
    columns of the kept weights, (rows, k); and which of these are not padding, (rows, k)."""
    places = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]
    valid = mask.gather(1, places)
    systems = gram[places[:, :, None], places[:, None, :]]
    systems.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), 0)
    systems.diagonal(dim1=1, dim2=2).masked_fill_(~valid, 1)
    return systems, places, valid


def _solve(systems: Tensor, right: Tensor, damping: float) -> tuple[Tensor, float]:
    """Solve (rows, n, n) systems for (rows, n) right sides, raising the damping where that fails; returns the solution
    and the largest damping that was needed."""
    solution = torch.empty_like(right)
    pending = torch.arange(len(right), device=right.device)
    diagonal = systems.diagonal(dim1=1, dim2=2).clone()
    while True:
        systems.diagonal(dim1=1, dim2=2).copy_(diagonal + damping)
        lower, works = cholesky(systems)
        # Two substitutions are many times faster than `torch.cholesky_solve` on a CPU.
        half = torch.linalg.solve_triangular(lower[works], right[works][..., None], upper=False)
        solution[pending[works]] = torch.linalg.solve_triangular(lower[works].mT, half, upper=True).squeeze(-1)
        if works.all():
            return solution, damping
        systems, right, diagonal, pending = (part[~works] for part in (systems, right, diagonal, pending))
        damping = next_damping(damping)


def _solve_together(weight: Tensor, mask: Tensor, system: Tensor, damping: float) -> Tensor:
    """`least_squares` of all rows at once, by preconditioned conjugate gradients in float32.

    With inputs scaled to a diagonal of one, a Gram matrix is close to F F^T + D, where D is diagonal and F has few
    columns, its leading directions. The same holds for the kept part of each row, whose inverse needs only matrices as
    large as the number of F's columns (Woodbury's identity). With it as preconditioner about ten iterations suffice.
    """
    scale = (system.diagonal() + damping).sqrt()
    matrix = (system / scale / scale[:, None]).float().fill_diagonal_(1)
    strong = _strong_directions(matrix)
    changed = torch.where(mask, weight.float(), 0)
    for rows in torch.arange(len(weight), device=weight.device).split(ROWS_TOGETHER):
        original, kept = weight[rows].to(system.dtype), mask[rows]
        pruned = original.masked_fill(kept, 0)
        gradient = pruned @ system
        error = (gradient * pruned).sum(dim=1)
        change = _conjugate_gradients(matrix, strong, kept.float(), (gradient / scale).float(), error.float())
        _take_better(changed, rows, original, (original + change / scale).masked_fill_(~kept, 0), system)
    return changed


def _conjugate_gradients(matrix: Tensor, strong: Tensor, kept: Tensor, right: Tensor, error: Tensor) -> Tensor:
    """Solve matrix_KK u = right_K for each row of (rows, in), until no row's error, (rows,), falls by `ENOUGH`."""
    approximate_inverse = _approximate_inverse(strong, kept)
    solution, residual, left = torch.zeros_like(right), right * kept, error
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
        # Polak and Ribiere's form, which tolerates rounding errors in the approximate inverse.
        turned = -(change * preconditioned).sum(dim=1, keepdim=True)
        direction = preconditioned.addcmul(_share(turned, product), direction)
        product = (residual * preconditioned).sum(dim=1, keepdim=True)
    return solution


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 for 0 / 0: rows that are solved no longer change."""
    return torch.where(whole > 0, part / whole, 0)


def _strong_directions(matrix: Tensor) -> Tensor:
    """F, (in, few), such that the matrix is about F F^T plus a diagonal; by deterministic subspace iteration."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    few = min(STRONG_DIRECTIONS, len(matrix))
    basis = torch.randn(len(matrix), few, generator=generator, device=matrix.device)
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    return basis @ vectors * values.clamp_min(0).sqrt()


def _approximate_inverse(strong: Tensor, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that multiplies each row of (rows, in) by the inverse of the kept part of F F^T + D, whose diagonal is
    one."""
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
