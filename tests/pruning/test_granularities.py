"""The granularity "variant" of the paper's code, and how granularities are written."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from random_scores import DTYPES, as_numpy, make_scores

from sparsefit.errors import ConfigError
from sparsefit.pruning.selection import (
    Granularity,
    select,
    select_variant,
)


def reference_variant(scores: np.ndarray, target: float) -> np.ndarray:
    low, high, best, nearest = 0.0, 1.0, None, np.inf
    for _ in range(60):
        alpha = (low + high) / 2
        kept = np.ones(scores.shape, dtype=bool)
        for i, row in enumerate(scores):
            ordered = np.sort(row)
            sums = np.cumsum(ordered)
            allowed = ordered[sums <= alpha * sums[-1]]
            if len(allowed):
                kept[i] = row > allowed[-1]
        reached = (~kept).mean()
        if abs(reached - target) < nearest:
            best, nearest = kept, abs(reached - target)
        if nearest <= 0.001:
            break
        low, high = (alpha, high) if reached < target else (low, alpha)
    return best if nearest <= max(0.001, 1 / best.size) and best.any() else exact_variant(scores, target)


def exact_variant(scores: np.ndarray, target: float) -> np.ndarray:
    """As many as are asked for, by the share of its row that a score and those before it add up to."""
    shares = np.empty(scores.shape)
    for i, row in enumerate(scores):
        order = np.argsort(row, kind="stable")
        sums = np.cumsum(row[order])
        shares[i, order] = sums / sums[-1] if sums[-1] else 0
    kept = np.ones(scores.size, dtype=bool)
    kept[np.argsort(shares.ravel(), kind="stable")[: floor(scores.size * Fraction(str(target)))]] = False
    return kept.reshape(scores.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", ["0.3", "0.5", "0.57", "0.95", "0.99"])
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_the_variant_equals_a_plain_loop(kind, sparsity, dtype):
    for shape in [(40, 60), (3, 7), (1, 1)]:
        scores = make_scores(kind, shape, dtype).abs()
        mask = select(scores, Granularity("variant"), Fraction(sparsity))
        np.testing.assert_array_equal(mask.numpy(), reference_variant(as_numpy(scores), float(sparsity)))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.95, 0.99])
def test_the_variant_reaches_its_target(sparsity):
    scores = make_scores("random", (128, 512)) * torch.logspace(-1, 1, 512)
    removed = 1 - select_variant(scores, Fraction(str(sparsity))).float().mean().item()
    assert abs(removed - sparsity) <= 0.001 + 1e-6


def test_the_variant_prunes_even_rows_more_than_uneven_ones():
    even, uneven = torch.ones(1, 100) + torch.linspace(0, 0.1, 100), torch.logspace(-4, 4, 100)[None]
    kept = select_variant(torch.cat([even, uneven]), Fraction(1, 2)).sum(dim=1)
    assert kept[0] > kept[1]


def test_the_variant_edges():
    assert select_variant(torch.zeros(2, 4), Fraction(0)).all()
    with pytest.raises(ValueError, match="negative"):
        select_variant(torch.tensor([[1.0, -1.0]]), Fraction(1, 2))


@pytest.mark.parametrize(
    ("value", "axis", "size", "text"),
    [
        ("output", "output", 1, "output"),
        ("layer", "layer", 1, "layer"),
        ("input", "input", 1, "input"),
        ("variant", "variant", 1, "variant"),
        ("(output, 128)", "output", 128, "(output, 128)"),
        ("output:128", "output", 128, "(output, 128)"),
        (("output", 128), "output", 128, "(output, 128)"),
        (["input", 128], "input", 128, "(input, 128)"),
        ("(output, 1)", "output", 1, "output"),
        ("('input', 2)", "input", 2, "(input, 2)"),
    ],
)
def test_granularities_are_read_in_every_spelling(value, axis, size, text):
    granularity = Granularity.parse(value)
    assert (granularity.axis, granularity.size, str(granularity)) == (axis, size, text)
    assert Granularity.parse(granularity) is granularity
    assert Granularity.parse(text) == granularity


@pytest.mark.parametrize(
    "value",
    [
        "rows",
        "",
        None,
        3,
        ("layer",),
        ("output",),
        ("layer", 2),
        ("variant", 1),
        "layer:4",
        "(output, 0)",
        "output:-1",
        "(output, 1.5)",
        "(output, 128",
        ("output", 0),
        ("output", 1.5),
        ("output", True),
        ("output", "128"),
        ("output", 1, 2),
        (["output"], 2),
    ],
    ids=repr,
)
def test_unknown_granularities_are_refused_with_the_choices(value):
    with pytest.raises(ConfigError, match=r"'output', 'input', 'layer', 'variant'.*\('output', k\)"):
        Granularity.parse(value)
