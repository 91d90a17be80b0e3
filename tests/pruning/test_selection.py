from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import reference_mask, reference_scores
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.selection import select_n_of_m

SPARSITIES = [0, 0.1, 0.3, 0.5, 0.57, 0.999]
SHAPES = [(4, 300), (9, 8), (3, 1), (1, 5), (2, 2), (16, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    assert PruningConfig(score="wanda").granularity == "output"
    assert PruningConfig(score="magnitude").granularity == "layer"


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="6 inputs"):
        select_n_of_m(torch.ones(2, 6), 2, 4)
