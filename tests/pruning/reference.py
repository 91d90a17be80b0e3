"""Slow and plain versions of what the engine does, written from the published description alone."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor


def reference_mask(
    scores: np.ndarray, sparsity: float = 0.5, granularity: str = "output", pattern: str | None = None, size: int = 1
) -> np.ndarray:
    """True = kept. One comparison group after the other, each sorted by (score, row, column)."""
    kept = np.ones(scores.shape, dtype=bool)
    if pattern is not None:
        n, m = map(int, pattern.split(":"))
        groups = [[(i, j + k) for k in range(m)] for i in range(scores.shape[0]) for j in range(0, scores.shape[1], m)]
        counts = [m - n] * len(groups)
    else:
        groups = reference_groups(scores.shape, granularity, size)
        counts = [int(len(group) * Decimal(str(sparsity))) for group in groups]
    remove_smallest(kept, scores, groups, counts)
    return kept


def reference_groups(shape: tuple[int, int], granularity: str, size: int = 1) -> list[list[tuple[int, int]]]:
    """The (row, column) places of each comparison group, in row-major order."""
    number = {
        "output": lambda i, j: i // size,
        "input": lambda i, j: j // size,
        "layer": lambda i, j: 0,
    }[granularity]
    groups: dict[int, list[tuple[int, int]]] = {}
    for i in range(shape[0]):
        for j in range(shape[1]):
            groups.setdefault(number(i, j), []).append((i, j))
    return [groups[key] for key in sorted(groups)]


def remove_smallest(kept: np.ndarray, scores: np.ndarray, groups: list[list[tuple[int, int]]], counts: list[int]):
    for group, count in zip(groups, counts, strict=True):
        for place in sorted(group, key=lambda place: (scores[place], place))[:count]:
            kept[place] = False


def reference_scores(weight: np.ndarray, squared_norm: np.ndarray | None) -> np.ndarray:
    """Magnitude without the (in,) squared norms, Wanda with them; all in float32."""
    scores = np.abs(weight.astype(np.float32))
    return scores if squared_norm is None else scores * np.sqrt(squared_norm.astype(np.float32))


def gram_of(inputs: list[Tensor]) -> np.ndarray:
    """Sum of x x^T over all tokens of (tokens, in) inputs, in float64."""
    return sum(x.double().numpy().T @ x.double().numpy() for x in inputs)


def squared_norm_of(inputs: list[Tensor]) -> np.ndarray:
    """Squares in float32, summed sample by sample, as one sample at a time would add them up."""
    total = torch.zeros(inputs[0].shape[1])
    for x in inputs:
        total += x.float().square().sum(dim=0)
    return total.numpy()


def damped_inverse(gram: np.ndarray, damping: float = 0.01) -> np.ndarray:
    return np.linalg.inv(gram + damping * gram.diagonal().mean() * np.eye(len(gram)))


def _ria(weight: np.ndarray, inputs: list[Tensor]) -> np.ndarray:
    size = np.abs(weight.astype(np.float64))
    with np.errstate(invalid="ignore"):
        relative = np.nan_to_num(size / size.sum(axis=0, keepdims=True)) + np.nan_to_num(
            size / size.sum(axis=1, keepdims=True)
        )
    return relative * np.sqrt(np.sqrt(squared_norm_of(inputs).astype(np.float64)))


def _sparsegpt(weight: np.ndarray, inputs: list[Tensor]) -> np.ndarray:
    gram = gram_of(inputs)
    scores = weight.astype(np.float64) ** 2 / damped_inverse(gram).diagonal()
    scores[:, gram.diagonal() == 0] = 0  # what no token uses costs nothing
    return scores


# From a float32 (out, in) weight and its (tokens, in) inputs, one tensor a sample, and how near to the engine's.
SCORES: dict[str, tuple[Callable[[np.ndarray, list[Tensor]], np.ndarray], float]] = {
    "magnitude": (lambda weight, inputs: reference_scores(weight, None), 0),
    "wanda": (lambda weight, inputs: reference_scores(weight, squared_norm_of(inputs)), 0),
    "wanda_l1": (lambda weight, inputs: np.abs(weight) * sum(x.double().abs().sum(0).numpy() for x in inputs), 1e-5),
    "wanda_linf": (lambda weight, inputs: np.abs(weight) * np.max([x.float().abs().amax(0) for x in inputs], 0), 0),
    "sparsegpt": (_sparsegpt, 1e-4),
    "ria": (_ria, 1e-5),
}


def score_of(name: str, weight: Tensor, inputs: list[Tensor]) -> tuple[np.ndarray, float]:
    function, tolerance = SCORES[name]
    return function(weight.float().numpy(), inputs), tolerance


def reference_variant(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Each row loses its small scores up to a share alpha of its sum; alpha is bisected, row by row in a loop."""
    low, high, nearest, best = 0.0, 1.0, 2.0, None
    for _ in range(60):
        alpha, kept = (low + high) / 2, np.ones(scores.shape, dtype=bool)
        for row, mask in zip(scores, kept, strict=True):
            ordered = np.sort(row)
            sums = np.cumsum(ordered, dtype=np.float64)
            going = [value for value, total in zip(ordered, sums, strict=True) if total <= alpha * sums[-1]]
            if going:
                mask[row <= going[-1]] = False
        reached = 1 - kept.mean()
        if abs(reached - sparsity) < nearest:
            nearest, best = abs(reached - sparsity), kept
        if nearest <= 0.001:
            break
        low, high = (alpha, high) if reached < sparsity else (low, alpha)
    return best


def assert_mask(mask: Tensor, scores: np.ndarray, tolerance: float = 0, counts: list[int] | None = None, **selection):
    """Each comparison group loses as many as it should, and the smallest: exactly the reference's mask, or, where
    scores carry rounding, none that is above a kept one by more than the relative tolerance."""
    mask = mask.numpy()
    sparsity, granularity = selection.get("sparsity", 0.5), selection.get("granularity", "output")
    if granularity == "variant" and selection.get("pattern") is None:
        np.testing.assert_array_equal(mask, reference_variant(scores.astype(np.float32), sparsity))
        return
    if tolerance == 0 and counts is None:
        np.testing.assert_array_equal(mask, reference_mask(scores, **selection))
        return
    groups = selection_groups(scores.shape, **selection)
    if counts is None:
        share = Decimal(str(sparsity))
        if selection.get("pattern"):
            n, m = map(int, selection["pattern"].split(":"))
            share = Decimal(m - n) / Decimal(m)
        counts = [int(len(group) * share) for group in groups]
    for group, count in zip(groups, counts, strict=True):
        rows, columns = np.array(group).T
        kept, values = mask[rows, columns], scores[rows, columns]
        assert (~kept).sum() == count
        if 0 < count < len(group):
            assert values[~kept].max() <= values[kept].min() * (1 + tolerance)


def selection_groups(
    shape: tuple[int, int], granularity: str = "output", pattern: str | None = None, size: int = 1, **_
):
    if pattern is None:
        return reference_groups(shape, granularity, size)
    m = int(pattern.split(":")[1])
    return [[(i, j + k) for k in range(m)] for i in range(shape[0]) for j in range(0, shape[1], m)]


def reference_sparsegpt(
    weight: np.ndarray,
    gram: np.ndarray,
    sparsity: float = 0.5,
    pattern: str | None = None,
    width: int = 128,
    score: str = "sparsegpt",
    granularity: str = "layer",
) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT's loop in float64 (Frantar and Alistarh 2023, Algorithm 1), one column after the other: the mask of
    every `width` columns (of every M, with a pattern) from the weights updated so far. With score "wanda", these
    weights are scored by Wanda instead."""
    weight, dead = weight.astype(np.float64), gram.diagonal() == 0
    norms, gram = np.sqrt(gram.diagonal()), gram + np.diag(dead.astype(float))
    weight[:, dead] = 0
    upper = np.linalg.cholesky(damped_inverse(gram)).T
    m = int(pattern.split(":")[1]) if pattern else width
    kept = np.ones(weight.shape, dtype=bool)
    for j in range(weight.shape[1]):
        if j % m == 0:
            part, pivots = weight[:, j : j + m], upper.diagonal()[j : j + m]
            scores = np.abs(part) * norms[j : j + m] if score == "wanda" else (part / pivots) ** 2
            columns = kept[:, j : j + m]  # a view
            columns[:] = reference_mask(scores, sparsity, granularity, pattern)
        remove_column(weight, kept[:, j], upper, j)
    return kept, weight


def remove_column(weight: np.ndarray, kept: np.ndarray, upper: np.ndarray, j: int) -> None:
    """Set the weights of column j that are not kept to zero; later columns compensate the error. In place."""
    error = np.where(kept, 0, weight[:, j]) / upper[j, j]
    weight[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    weight[~kept, j] = 0


def reference_update(weight: np.ndarray, kept: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The weights that SparseGPT's update gives for a mask that is known from the start; no input may be dead."""
    weight, upper = weight.astype(np.float64), np.linalg.cholesky(damped_inverse(gram)).T
    for j in range(weight.shape[1]):
        remove_column(weight, kept[:, j], upper, j)
    return weight


def reference_least_squares(
    weight: np.ndarray, kept: np.ndarray, gram: np.ndarray, damping: float = 0.01
) -> np.ndarray:
    """The kept weights of each row that minimise its error, where damping pulls them towards the original weights."""
    solved, pull = np.zeros(weight.shape), damping * gram.diagonal().mean()
    system = gram + pull * np.eye(len(gram))
    for row, original, places in zip(solved, weight.astype(np.float64), kept, strict=True):
        right = (gram @ original)[places] + pull * original[places]
        row[places] = np.linalg.solve(system[np.ix_(places, places)], right)
    return solved


def row_error(weight: np.ndarray, kept: np.ndarray, gram: np.ndarray) -> float:
    pruned = np.where(kept, 0, weight)
    return float(pruned @ gram @ pruned)


def best_swap(weight: np.ndarray, kept: np.ndarray, gram: np.ndarray, group: int) -> tuple[float, int, int]:
    """The best of all pairs within groups of columns, each error computed afresh: (error, unpruned, pruned)."""
    tried = []
    for p in np.flatnonzero(~kept):
        for q in np.flatnonzero(kept):
            if p // group == q // group:
                changed = kept.copy()
                changed[p], changed[q] = True, False
                tried.append((row_error(weight, changed, gram), p, q))
    return min(tried, default=(np.inf, 0, 0))


def reference_swap(weight: np.ndarray, mask: np.ndarray, gram: np.ndarray, max_swaps: int, group: int) -> np.ndarray:
    """The mask after the best swap of each row, up to `max_swaps` times, as long as one lowers the row's error."""
    mask = mask.copy()
    for row, kept in zip(weight.astype(np.float64), mask, strict=True):
        for _ in range(max_swaps):
            error, p, q = best_swap(row, kept, gram, group)
            if error >= row_error(row, kept, gram) * (1 - 1e-9):
                break
            kept[p], kept[q] = True, False
    return mask


def reference_error(weight: Tensor, changed: Tensor, inputs: list[Tensor]) -> float:
    """Squared error of a layer's outputs on its inputs, as a share of the squared outputs."""
    tokens = torch.cat(inputs).double()
    outputs = tokens @ weight.double().t()
    return float((tokens @ changed.double().t() - outputs).square().sum() / outputs.square().sum())
