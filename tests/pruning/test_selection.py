from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scores import DTYPES, KINDS, as_numpy, make_scores
from reference import reference_groups, reference_mask, reference_scores, remove_smallest
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.selection import (
    Granularity,
    Products,
    mask_of_smallest,
    select,
    select_n_of_m,
)

SPARSITIES = [0, 0.1, 0.3, 0.5, 0.57, 0.999]
SHAPES = [(4, 300), (9, 8), (3, 1), (1, 5), (2, 2), (16, 40)]


def layer_and_inputs(shape: tuple[int, int], dtype: torch.dtype, tied: bool) -> tuple[nn.Module, torch.Tensor]:
    """A layer whose inputs are small whole numbers: their squared norms are exact in whatever order they add up."""
    generator = torch.Generator().manual_seed(sum(shape))
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).to(dtype)
    if tied:
        weight = torch.randint(-2, 3, shape, generator=generator) / 2
        inputs = torch.randint(0, 2, (2, shape[1]), generator=generator)
    else:
        weight = torch.randn(shape, generator=generator)
        inputs = torch.randint(-3, 4, (6, shape[1]), generator=generator)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model, inputs.to(dtype)


def check_against_reference(model: nn.Module, inputs: torch.Tensor, **settings) -> None:
    weight = model[0].weight.detach().float().numpy()
    norms = inputs.float().square().sum(dim=0).numpy() if settings["score"] == "wanda" else None
    expected = reference_mask(
        reference_scores(weight, norms), **{k: v for k, v in settings.items() if k != "score" and v is not None}
    )
    result = prune(model, [inputs], PruningConfig(**settings))
    np.testing.assert_array_equal(result.masks["0.weight"].numpy(), expected)
    np.testing.assert_array_equal(model[0].weight.detach().float().numpy(), np.where(expected, weight, 0))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["output", "layer"])
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_unstructured_masks_equal_a_sort_of_each_group(score, granularity, dtype, tied):
    for shape in SHAPES:
        for sparsity in SPARSITIES:
            model, inputs = layer_and_inputs(shape, dtype, tied)
            check_against_reference(model, inputs, score=score, granularity=granularity, sparsity=sparsity)


@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4", "1:2", "5:40"])
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_n_of_m_masks_equal_a_sort_of_each_group(score, pattern, dtype, tied):
    for shape in [(5, 40), (1, 80)]:
        model, inputs = layer_and_inputs(shape, dtype, tied)
        check_against_reference(model, inputs, score=score, pattern=pattern)


@pytest.mark.parametrize(
    ("granularity", "inputs", "sparsity", "zeros"),
    [("output", 300, 0.57, 2 * 171), ("output", 7, 0.5, 2 * 3), ("layer", 7, 0.5, 7), ("layer", 50, 0.29, 29)],
)
def test_counts_are_exact(granularity, inputs, sparsity, zeros):
    model, data = layer_and_inputs((2, inputs), torch.float32, tied=False)
    result = prune(model, [data], PruningConfig(sparsity=sparsity, granularity=granularity))
    assert result.masks.counts() == {"0.weight": (2 * inputs, zeros)}
    assert int((model[0].weight == 0).sum()) == zeros


def test_all_scores_equal_leaves_the_right_end_of_each_row():
    model, data = layer_and_inputs((2, 6), torch.float32, tied=False)
    nn.init.ones_(model[0].weight)
    mask = prune(model, [torch.ones_like(data)], PruningConfig(sparsity=0.5)).masks["0.weight"]
    assert mask.tolist() == [[False] * 3 + [True] * 3] * 2


def test_authors_granularity_is_the_default():
    assert str(PruningConfig(score="wanda").granularity) == "output"
    assert str(PruningConfig(score="magnitude").granularity) == "layer"


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="6 inputs"):
        select_n_of_m(torch.ones(2, 6), 2, 4)


GRANULARITIES = ["output", "input", "layer", "(output, 3)", "(input, 4)", "(output, 100)"]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", GRANULARITIES)
def test_each_group_loses_its_smallest(text, kind, dtype):
    granularity = Granularity.parse(text)
    for shape in [(7, 30), (8, 12), (1, 5)]:
        scores = make_scores(kind, shape, dtype)
        for sparsity in ["0.5", "0.57", "0.6", "0.3", "0", "0.99"]:
            expected = reference_mask(as_numpy(scores), sparsity, granularity.axis, size=granularity.size)
            mask = select(scores, granularity, Fraction(sparsity))
            assert mask.dtype == torch.bool
            np.testing.assert_array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "3:5", "1:2", "7:8"])
def test_n_of_m_loses_the_smallest_of_each_group(pattern, kind, dtype):
    n, m = map(int, pattern.split(":"))
    scores = make_scores(kind, (9, 6 * m), dtype)
    np.testing.assert_array_equal(
        select_n_of_m(scores, n, m).numpy(), reference_mask(as_numpy(scores), pattern=pattern)
    )


def test_n_of_m_of_wide_groups_and_of_matrices_above_a_chunk():
    for n, m, shape in [(100, 200, (3, 400)), (3, 5, (300, 2000)), (2, 4, (150, 4096))]:
        scores = make_scores("tied", shape)
        expected = mask_of_stable_sort(scores.reshape(-1, m), m - n).view(shape)
        assert torch.equal(select_n_of_m(scores, n, m), expected)


def mask_of_stable_sort(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = scores.sort(dim=1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "outliers", "constant", "ascending"])
@pytest.mark.parametrize("shape", [(150, 4096), (5, 1100), (2, 200_000), (1, 600_000)])
def test_large_rows_equal_a_stable_sort(shape, kind):
    if kind == "outliers":
        scores = make_scores("random", shape) * torch.logspace(-10, 10, shape[1])
    elif kind == "constant":
        scores = torch.full(shape, 0.25)
    elif kind == "ascending":
        scores = torch.arange(shape[1], dtype=torch.float32).expand(shape)
    else:
        scores = make_scores(kind, shape)
    for count in (1, shape[1] // 2, int(shape[1] * 0.99), shape[1] - 1):
        assert torch.equal(mask_of_smallest(scores, count), mask_of_stable_sort(scores, count))


def test_scores_need_not_be_contiguous():
    scores = make_scores("tied", (12, 8)).t()
    for text in GRANULARITIES:
        granularity = Granularity.parse(text)
        expected = select(scores.contiguous(), granularity, Fraction(1, 2))
        assert torch.equal(select(scores, granularity, Fraction(1, 2)), expected)
    assert torch.equal(select_n_of_m(scores, 2, 4), select_n_of_m(scores.contiguous(), 2, 4))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 12),
    text=st.sampled_from(GRANULARITIES),
    kind=st.sampled_from(KINDS),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_count_is_met_and_spread_by_group_sizes(rows, columns, text, kind, share, seed):
    granularity = Granularity.parse(text)
    scores = make_scores(kind, (rows, columns), seed=seed)
    count = round(share * scores.numel())
    mask = select(scores, granularity, count)
    assert int((~mask).sum()) == count
    assert torch.equal(mask, select(scores.clone(), granularity, count))
    groups = reference_groups((rows, columns), granularity.axis, granularity.size)
    removed = [count * len(group) // scores.numel() for group in groups]
    for i in range(count - sum(removed)):
        removed[i] += 1
    expected = np.ones((rows, columns), dtype=bool)
    remove_smallest(expected, as_numpy(scores), groups, removed)
    np.testing.assert_array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [*GRANULARITIES, "variant"])
def test_products_give_the_masks_of_their_scores(text, dtype, scaled):
    granularity = Granularity.parse(text)
    weight = make_scores("tied", (7, 24), dtype)
    products = Products(weight, make_scores("random", (1, 24))[0] if scaled else None)
    scores = products.scores()
    assert torch.equal(scores, weight.float().abs() * (products.factor if scaled else 1))
    assert products.are_finite()
    assert torch.equal(select(products, granularity, Fraction(1, 2)), select(scores, granularity, Fraction(1, 2)))
    assert torch.equal(select_n_of_m(products, 2, 4), select_n_of_m(scores, 2, 4))
    if text != "variant":
        assert torch.equal(select(products, granularity, 50), select(scores, granularity, 50))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_the_largest_product_tells_of_scores_that_are_not_finite(value):
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    weight[1, 2] = value
    assert not Products(weight, torch.ones(4)).are_finite()
    assert not Products(torch.full((2, 2), 1e30), torch.tensor([1e30, 1.0])).are_finite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 300), (300, 1000), (1, 100_000), (70, 4096)])
def test_a_gpu_gives_the_masks_of_the_cpu_bit_for_bit(shape, kind, dtype):
    scores = make_scores(kind, shape, dtype)
    factor = make_scores("random", (1, shape[1]))[0]
    for text in GRANULARITIES:
        granularity = Granularity.parse(text)
        for on_cpu, on_gpu in [
            (scores, scores.cuda()),
            (Products(scores), Products(scores.cuda())),
            (Products(scores, factor), Products(scores.cuda(), factor.cuda())),
        ]:
            for count in (1, scores.numel() // 2):
                expected = select(on_cpu, granularity, count)
                assert torch.equal(select(on_gpu, granularity, count).cpu(), expected)
            if shape[1] % 4 == 0:
                assert torch.equal(select_n_of_m(on_gpu, 2, 4).cpu(), select_n_of_m(on_cpu, 2, 4))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), m=st.integers(2, 12), rows=st.integers(1, 5), groups=st.integers(1, 5))
def test_every_n_of_m_group_keeps_n_and_none_below_a_removed_one(data, m, rows, groups):
    n = data.draw(st.integers(1, m - 1))
    size = rows * groups * m
    values = data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, -1)
    kept = select_n_of_m(scores, n, m).view(-1, m)
    assert (kept.sum(dim=1) == n).all()
    parts = scores.view(-1, m)
    assert (parts.masked_fill(kept, -torch.inf).amax(dim=1) <= parts.masked_fill(~kept, torch.inf).amin(dim=1)).all()
