"""New values for the weights that are kept, column by column. Pure functions of weights, masks and the Gram matrix.

Weights are passed in dense, (out, in), with any floating dtype, and returned as float32, exactly zero outside the mask.
Multiplying the Gram matrix by a constant changes no result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefit.pruning.gram import cholesky, next_damping, unit_gram
from sparsefit.pruning.selection import triton_works

Choose = Callable[[Tensor, slice, Tensor], Tensor]


class Factor(NamedTuple):
    """The inverse of a damped Gram matrix, (G + damping)^-1 = upper^T upper, for updates column by column.

    Row j of the upper triangle, divided by its diagonal element, is the change of the later columns that compensates
    one unit of error in column j.
    """

    upper: Tensor  # (in, in) float32
    damping: float  # the damping that was used, as a share of the mean of diag(G)
    dead: Tensor  # (in,) bool, inputs that were zero in every token


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Factor:
    """Upper Cholesky factor of (G + damping * mean(diag G) I)^-1 (SparseGPT, arXiv 2301.00774, Section 3.3).

    If the factorisation fails, or only rounding noise of some input is left, the damping is raised tenfold until it
    works; at 0.01 that happens only with a damaged matrix. G^-1 itself is never formed: the factor costs about in^3
    multiply-adds and memory for four (in, in) matrices in `precise_dtype`.

    >>> inverse_factor(torch.diag(torch.tensor([4.0, 4.0])), damping=0.0).upper.tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    system, scale, dead = unit_gram(gram)
    reverse = system.flip(0, 1)
    diagonal = reverse.diagonal().clone()
    while True:
        reverse.diagonal().copy_(diagonal + damping)
        lower, works = cholesky(reverse)
        if works:
            # With P G P = L L^T, where P reverses the inputs, G^-1 = (P L^-1 P)^T (P L^-1 P), upper triangular.
            identity = torch.eye(len(gram), dtype=lower.dtype, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            return Factor((upper / scale.sqrt()).float(), damping, dead)
        damping = next_damping(damping)


def inverse_diagonal(factor: Factor) -> Tensor:
    """diag((G + damping)^-1), (in,) float32; infinite for dead inputs, so that their weights score zero.

    >>> inverse_diagonal(inverse_factor(torch.diag(torch.tensor([4.0, 0.0])), damping=0.0))
    tensor([0.2500,    inf])
    """
    return torch.linalg.vector_norm(factor.upper, dim=0).square().masked_fill_(factor.dead, torch.inf)


def update_sequentially(weight: Tensor, mask: Tensor, factor: Factor, block_size: int = 128) -> Tensor:
    """Prune column by column; the kept weights of later columns compensate each error (optimal brain surgeon in
    SparseGPT's order: arXiv 2301.00774, Section 3). Costs out * in^2 multiply-adds; the block size only affects speed.

    Weights of dead inputs do not change, as nothing is known of them.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # the second weight compensates the first
    >>> update_sequentially(torch.ones(1, 2), torch.tensor([[False, True]]), inverse_factor(gram, damping=0.0))
    tensor([[0.0000, 1.5000]])
    """
    return _update(weight.float(), factor.upper, lambda _, columns, __: mask[:, columns], block_size)[1]


def prune_iteratively(
    weight: Tensor,
    factor: Factor,
    choose: Choose,
    block_size: int = 128,
    group: int | None = None,
    keep: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The mask and the weights by SparseGPT's loop: masks are chosen block by block, on weights that already compensate
    the errors of earlier columns (arXiv 2301.00774, Algorithm 1). Weights of dead inputs are set to zero first.

    Args:
        weight: (out, in), any floating dtype.
        factor: From `inverse_factor`.
        choose: Called with the weights of a block of columns, (out, b), the slice of columns and the diagonal of
            `factor.upper` there, (b,); returns the block's mask, (out, b). SparseGPT's score is
            `(weights / diagonal) ** 2`.
        block_size: b, the number of columns whose weights compete; the last block may be narrower.
        group: M, to choose masks for M columns at a time instead (N:M sparsity).
        keep: N, if `choose` keeps the N largest of SparseGPT's own scores: a GPU then does that in the same kernel.

    >>> factor = inverse_factor(torch.eye(2))
    >>> prune_iteratively(torch.tensor([[1.0, 2.0]]), factor, lambda weights, columns, diagonal: weights > 1)
    (tensor([[False,  True]]), tensor([[0., 2.]]))
    """
    return _update(weight.float().masked_fill(factor.dead, 0), factor.upper, choose, block_size, group, keep)


def _update(
    weight: Tensor, upper: Tensor, choose: Choose, block_size: int, group: int | None = None, keep: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mask and the weights, by blocks of columns."""
    inputs = weight.shape[1]
    block_size = max(block_size // group, 1) * group if group else block_size
    pattern = (keep, group) if keep and group <= 64 else None  # what the kernel can choose
    by_kernel = triton_works(weight.device) and (group is None or pattern is not None)
    work = weight.t().clone(memory_format=torch.contiguous_format)  # (in, out): each column of weights is contiguous
    kept = torch.empty_like(work, dtype=torch.bool)
    upper = upper.contiguous()

    def choose_columns(columns: slice) -> None:
        kept[columns] = choose(work[columns].t().contiguous(), columns, upper.diagonal()[columns]).t()

    for start in range(0, inputs, block_size):
        block = slice(start, min(start + block_size, inputs))
        if group is None:
            choose_columns(block)
        if by_kernel:
            from sparsefit.pruning.update_kernels import update_columns  # imports Triton

            errors = update_columns(work[block], kept[block], upper[block, block], pattern)
        else:
            errors = _update_columns(work, kept, upper, block, group, choose_columns)
        work[block.stop :].addmm_(upper[block, block.stop :].t(), errors, alpha=-1)
    return kept.t().contiguous(), work.t().contiguous()


def _update_columns(
    work: Tensor, kept: Tensor, upper: Tensor, block: slice, group: int | None, choose_columns: Callable[[slice], None]
) -> Tensor:
    """Prune one column after another, in place, choosing masks at the start of each group. Returns the (columns, out)
    errors: the factor by which a row of `upper` is subtracted from the later columns."""
    errors = torch.empty_like(work[block])
    for j in range(block.start, block.stop):
        if group is not None and j % group == 0:
            choose_columns(slice(j, j + group))
        error = errors[j - block.start]
        torch.div(work[j].masked_fill(kept[j], 0), upper[j, j], out=error)
        work[j].masked_fill_(~kept[j], 0)
        work[j + 1 : block.stop].addr_(upper[j, j + 1 : block.stop], error, alpha=-1)
    return errors
