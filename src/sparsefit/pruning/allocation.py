"""How sparse each matrix becomes: the number of weights to remove from each; their sum is exactly the target."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from math import floor, prod

import torch
from torch import Tensor

from sparsefit.errors import ConfigError
from sparsefit.pruning.config import PruningConfig, layer_name, matches
from sparsefit.pruning.input_groups import Part
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.scores import wanda_score


def allocate(
    weights: list[PrunableWeight],
    config: PruningConfig,
    groups: Mapping[str, int] | None = None,
    parts: Mapping[str, list[Part]] | None = None,
    one_by_one: Callable[[Iterable[PrunableWeight]], Iterable[PrunableWeight]] = iter,
) -> dict[str, int]:
    """How many weights each matrix loses under the configuration's allocation; empty if there is no allocation and
    every comparison group loses the same share. OWL needs `groups` (the block of each weight) and `parts` (input
    statistics of the dense network); it iterates over `one_by_one(weights)`, so that they need not all be in memory.

    >>> allocate([PrunableWeight("fc", Tensor(4, 5), ())], PruningConfig(sparsity=0.25, allocation="uniform"))
    {'fc': 5}
    """
    if config.allocation is None:
        return {}
    sizes = {weight.name: prod(weight.shape) for weight in weights}
    if config.allocation == "uniform":
        return uniform(sizes, config.exact_sparsity)
    if config.allocation != "owl":
        return by_mapping(sizes, config.exact_sparsity, config.allocation)
    outliers = {}
    for group in dict.fromkeys(groups.values()):
        scores = [
            wanda_score(weight.matrix()[rows], statistics["squared_norm"]).scores()
            for weight in one_by_one(weights)
            if groups[weight.name] == group
            for rows, statistics in parts[weight.name]
        ]
        outliers[group] = outlier_share(scores, config.owl_threshold)
    return owl(sizes, groups, outliers, config.exact_sparsity, config.owl_spread)


def uniform(sizes: Mapping[str, int], sparsity: Fraction) -> dict[str, int]:
    """Remove the same share of every matrix, rounded so that floor(sparsity * all weights) are removed in total.

    >>> uniform({"a": 3, "b": 5}, Fraction(1, 2))
    {'a': 2, 'b': 2}
    """
    shares = {name: size * sparsity for name, size in sizes.items()}
    return _rounded(shares, sizes, floor(sum(sizes.values()) * sparsity))


def by_mapping(sizes: Mapping[str, int], sparsity: Fraction, given: Mapping[str, float]) -> dict[str, int]:
    """The sparsities that the user gave for some layers; the remaining layers share the rest of the total evenly.

    `given` maps a layer name, or consecutive parts of one, to a sparsity; the longest name that matches is used.

    >>> by_mapping({"0.fc.weight": 10, "0.out.weight": 10}, Fraction(1, 2), {"fc": 0.3})
    {'0.fc.weight': 3, '0.out.weight': 7}
    """
    shares: dict[str, Fraction] = {}
    for pattern in sorted(given, key=len):
        matching = [name for name in sizes if matches(layer_name(name), [pattern])]
        if not matching:
            raise ConfigError(f"allocation names '{pattern}', but no pruned layer has that name")
        shares |= {name: Fraction(str(given[pattern])) for name in matching}
    fixed = {name: sizes[name] * share for name, share in shares.items()}
    counts = _rounded(fixed, sizes, floor(sum(fixed.values())))
    rest = {name: size for name, size in sizes.items() if name not in shares}
    if not rest:
        return counts
    total, gone = floor(sum(sizes.values()) * sparsity), sum(counts.values())
    left = Fraction(total - gone, sum(rest.values()))
    if not 0 <= left < 1:
        raise ConfigError(
            f"the allocation removes {gone} weights of its layers; with {total} in all (sparsity {float(sparsity):g}) "
            f"the other layers would need a sparsity of {float(left):.3f}: change the shares or the sparsity"
        )
    counts |= _rounded({name: size * left for name, size in rest.items()}, rest, total - gone)
    return {name: counts[name] for name in sizes}


def owl(
    sizes: Mapping[str, int],
    groups: Mapping[str, int],
    outliers: Mapping[int, float],
    sparsity: Fraction,
    spread: float = 0.08,
) -> dict[str, int]:
    """Blocks with more outliers keep more weights (OWL: Yin et al. 2024, arXiv 2310.05175, Section 3).

    A block's density grows linearly with its share of outliers; the lowest and the highest density are 2 * spread
    (lambda) apart, around the mean that gives the total. `groups` maps each matrix to its block, and `outliers` each
    block to its `outlier_share`.

    >>> owl({"a": 10, "b": 10}, {"a": 0, "b": 1}, {0: 1.0, 1: 3.0}, Fraction(1, 2), spread=0.2)
    {'a': 7, 'b': 3}
    """
    lowest = min(outliers.values())
    width = max(outliers.values()) - lowest
    # How far each density lies above the lowest. Divide by the width first: 1 / width can overflow a float.
    lean = {g: Fraction((share - lowest) / width * 2 * spread) if width else 0 for g, share in outliers.items()}
    total = floor(sum(sizes.values()) * sparsity)

    def removed(shift: Fraction) -> dict[str, Fraction]:
        return {n: size * min(Fraction(1), max(Fraction(0), shift - lean[groups[n]])) for n, size in sizes.items()}

    # The sum grows with the shift. If no density is clamped to 0 or 1, the first guess is the solution.
    low, high = Fraction(0), Fraction(1) + max(lean.values())
    shift = Fraction(total + sum(size * lean[groups[n]] for n, size in sizes.items()), sum(sizes.values()))
    for _ in range(60):
        missing = total - sum(removed(shift).values())
        if abs(missing) < 1:
            break
        low, high = (shift, high) if missing > 0 else (low, shift)
        shift = (low + high) / 2
    return _rounded(removed(shift), sizes, total)


def by_change(
    sizes: Mapping[str, int], changes: Mapping[str, Tensor], sparsity: Fraction, spread: float = 0.2
) -> dict[str, int]:
    """Remove the weights that change the model's predictions least: all matrices reach one change per further weight.

    Args:
        sizes: The number of weights of each matrix.
        changes: For each matrix the curve of its `fisher.Sensitivity`, (points,) ascending. Matrices without one lose
            the same share.
        sparsity: Of all weights together; floor(sparsity * all weights) are removed.
        spread: How far a matrix's sparsity may lie from it.

    >>> low, high = Tensor([1.0, 2.0, 3.0, 4.0]), Tensor([3.0, 6.0, 9.0, 12.0])
    >>> by_change({"a": 8, "b": 8}, {"a": low, "b": high}, Fraction(1, 2), spread=0.5)
    {'a': 6, 'b': 2}
    """
    unknown = uniform({name: size for name, size in sizes.items() if name not in changes}, sparsity)
    if not changes:
        return unknown
    total, spread = floor(sum(sizes.values()) * sparsity) - sum(unknown.values()), Fraction(str(spread))
    least, most = max(Fraction(0), sparsity - spread), min(Fraction(1), sparsity + spread)

    def removed(level: Tensor | None) -> dict[str, Fraction]:
        reached = {n: 0 if level is None else int(torch.searchsorted(c, level, right=True)) for n, c in changes.items()}
        return {n: sizes[n] * min(most, max(least, Fraction(reached[n], len(changes[n])))) for n in changes}

    levels: list[Tensor | None] = [None, *torch.cat(list(changes.values())).unique()]
    # The first level at which at least the total is removed.
    place = bisect_left(range(1, len(levels) - 1), total, key=lambda place: sum(removed(levels[place]).values())) + 1
    below, above = removed(levels[place - 1]), removed(levels[place])
    step = sum(above.values()) - sum(below.values())
    part = (total - sum(below.values())) / step if step else 0
    shares = {name: below[name] + part * (above[name] - below[name]) for name in changes}
    counts = unknown | _rounded(shares, sizes, total)
    return {name: counts[name] for name in sizes}


def outlier_share(scores: list[Tensor], threshold: float = 5.0) -> float:
    """Percentage of the scores of a block's matrices that are above `threshold` (M) times their mean (OWL, Equation 2).

    >>> outlier_share([Tensor([1.0, 1.0, 1.0, 9.0])], threshold=2.0)
    25.0
    """
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / count
    return 100 * sum(int((score > threshold * mean).sum()) for score in scores) / count


def _rounded(shares: Mapping[str, Fraction], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Round the shares to whole counts with the given sum: down, then up where the fractional part is largest."""
    counts = {name: floor(share) for name, share in shares.items()}
    missing = total - sum(counts.values())
    step = 1 if missing > 0 else -1
    by_fraction = sorted(shares, key=lambda name: step * (counts[name] - shares[name]))
    while missing:
        for name in by_fraction:
            if missing and 0 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return counts
