"""Weights that change and masks that are refined: `prune` with reconstruction, swaps and damping."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from reference import (
    assert_mask,
    gram_of,
    reference_error,
    reference_mask,
    reference_scores,
    reference_sparsegpt,
    score_of,
    squared_norm_of,
)
from reference_inputs import collect, matrix_of, staged
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.least_squares import least_squares
from sparsefit.pruning.refinement import swap
from sparsefit.pruning.weight_updates import inverse_factor, update_sequentially

METHODS = ["sequential", "iterative", "least_squares"]
WIDE = 150  # more than the 128 columns that SparseGPT takes at once


def samples(lengths: tuple[int, ...] = (40, 25, 40)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 61, (1, length), generator=generator)} for length in lengths]


def blocks_of(model: nn.Module) -> list[list[str]]:
    names = [name for name in collect(model, samples()[:1]) if "layers." in name]
    return [list(block) for _, block in itertools.groupby(names, key=lambda name: name.split(".")[2])]


def plain(width: int = WIDE, outputs: int = 12) -> tuple[nn.Module, list[Tensor]]:
    """One layer, and inputs that are correlated."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(width, outputs)).eval()
    with torch.no_grad():
        model[0].weight.normal_(generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    return model, [torch.randn(1, 60, width, generator=generator) @ mixing for _ in range(8)]


def gram_matrix(inputs: list[Tensor]) -> Tensor:
    return torch.from_numpy(gram_of(inputs)).float()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("swaps", [0, 3])
@pytest.mark.parametrize("reconstruction", [None, "sequential", "least_squares"])
def test_weights_equal_the_pure_functions_on_gram_matrices_of_whole_model_passes(
    tiny_model, reconstruction, swaps, pattern, dtype
):
    model = tiny_model("llama", num_hidden_layers=2).to(dtype)
    dense = copy.deepcopy(model)
    config = PruningConfig(reconstruction=reconstruction, swaps=swaps, pattern=pattern, micro_batch_size=1)
    result = prune(model, samples(), config)
    result.masks.verify(model)
    for name, weight, changed, inputs in staged(dense, model, samples(), blocks_of(dense)):
        gram, mask = gram_matrix(inputs), result.masks[name]
        scores, _ = score_of("wanda", weight, inputs)
        chosen = torch.from_numpy(reference_mask(scores, pattern=pattern))
        if swaps:
            chosen = swap(weight, chosen, gram, swaps, (2, 4) if pattern else None)
        assert torch.equal(mask, chosen), name
        assert bool((changed[~mask] == 0).all())
        if reconstruction is None:
            assert torch.equal(changed[mask], weight[mask])
        else:
            expected = (
                update_sequentially(weight.float(), mask, inverse_factor(gram))
                if reconstruction == "sequential"
                else least_squares(weight.float(), mask, gram, 0.01)[0]
            )
            tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(changed.float(), expected, **tolerance)
            assert float((changed[mask] != weight[mask]).float().mean()) > (0.9 if dtype == torch.float32 else 0.5)
    assert result.layer_errors.keys() == (result.masks.keys() if config.statistics > {"squared_norm"} else set())


@pytest.mark.parametrize("pattern", [None, "2:4", "1:3"])
def test_iterative_is_sparsegpt(pattern):
    model, data = plain()
    if pattern == "2:4":
        model, data = plain(width=148)
    dense = matrix_of(model, "0.weight").clone().numpy()
    config = PruningConfig(pattern=pattern, score="sparsegpt", reconstruction="iterative")
    assert config.granularity == "(input, 128)"
    result = prune(model, data, config)
    inputs = collect(model, data)["0.weight"]
    mask, weight = reference_sparsegpt(dense, gram_of(inputs), pattern=pattern)
    np.testing.assert_array_equal(result.masks["0.weight"].numpy(), mask)
    np.testing.assert_allclose(matrix_of(model, "0.weight").numpy(), weight, rtol=1e-3, atol=1e-4)
    error = reference_error(torch.from_numpy(dense), matrix_of(model, "0.weight"), inputs)
    assert result.layer_errors["0.weight"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_block_by_block_on_a_transformer(tiny_model, pattern):
    model = tiny_model("llama", num_hidden_layers=2)
    dense = copy.deepcopy(model)
    config = PruningConfig(pattern=pattern, score="sparsegpt", reconstruction="iterative", micro_batch_size=1)
    result = prune(model, samples(), config)
    for name, weight, changed, inputs in staged(dense, model, samples(), blocks_of(dense)):
        mask, expected = reference_sparsegpt(weight.numpy(), gram_of(inputs), pattern=pattern)
        np.testing.assert_array_equal(result.masks[name].numpy(), mask, err_msg=name)
        np.testing.assert_allclose(changed.numpy(), expected, rtol=5e-3, atol=5e-3, err_msg=name)
        assert result.layer_errors[name] == pytest.approx(reference_error(weight, changed, inputs), rel=1e-2)


def test_iterative_with_wanda_chooses_each_128_columns_on_updated_weights():
    model, data = plain()
    dense, gram = matrix_of(model, "0.weight").clone(), gram_matrix(collect(model, data)["0.weight"])
    result = prune(model, data, PruningConfig(reconstruction="iterative", sparsity=0.57))
    mask, weight = result.masks["0.weight"], matrix_of(model, "0.weight")
    first = reference_mask(reference_scores(dense.numpy(), gram.diagonal().numpy())[:, :128], 0.57)
    np.testing.assert_array_equal(mask[:, :128].numpy(), first)
    # The mask being known, the loop is the sequential update; and the last columns rest on what it gives before them.
    torch.testing.assert_close(weight, update_sequentially(dense, mask, inverse_factor(gram)), rtol=1e-3, atol=1e-4)
    before_last = update_sequentially(
        dense, torch.cat([mask[:, :128], torch.ones(12, WIDE - 128, dtype=torch.bool)], dim=1), inverse_factor(gram)
    )
    scores = reference_scores(before_last.numpy(), gram.diagonal().numpy())[:, 128:]
    assert_mask(mask[:, 128:], scores, 1e-4, sparsity=0.57)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_errors_fall_in_the_order_of_the_effort(dtype, pattern):
    def error(**settings) -> float:
        model, data = plain(width=148)
        model, data = model.to(dtype), [x.to(dtype) for x in data]
        dense = matrix_of(model, "0.weight").clone()
        result = prune(model, data, PruningConfig(pattern=pattern, **settings))
        changed, inputs = matrix_of(model, "0.weight"), collect(model, data)["0.weight"]
        measured = reference_error(dense, changed, inputs)
        if result.layer_errors:  # before rounding to the weights' dtype
            assert result.layer_errors["0.weight"] == pytest.approx(measured, rel=1e-3 if dtype.itemsize == 4 else 0.05)
        return measured

    wanda, swapped = error(), error(swaps=20)
    assert error(swaps=1) < wanda
    assert swapped < error(swaps=3) < wanda
    sequential, exact = error(reconstruction="sequential"), error(reconstruction="least_squares")
    assert exact < sequential < wanda
    assert exact < swapped
    assert error(reconstruction="iterative", score="sparsegpt") < wanda
    assert error(swaps=20, reconstruction="least_squares") < exact
    assert error(swaps=20, reconstruction="sequential") < sequential


@pytest.mark.parametrize(
    "settings", [{"swaps": 5}, {"swaps": 5, "pattern": "2:4"}, {"swaps": 5, "granularity": "layer"}]
)
def test_swaps_keep_the_counts_of_every_row_and_the_values(settings):
    model, data = plain(width=148)
    plain_mask = prune(copy.deepcopy(model), data, PruningConfig(**(settings | {"swaps": 0}))).masks["0.weight"]
    dense = matrix_of(model, "0.weight").clone()
    mask = prune(model, data, PruningConfig(**settings)).masks["0.weight"]
    assert torch.equal(mask.sum(dim=1), plain_mask.sum(dim=1))
    assert 0 < int((mask & ~plain_mask).sum(dim=1).max()) <= 5
    if "pattern" in settings:
        assert bool((mask.reshape(12, -1, 4).sum(-1) == 2).all())
    assert torch.equal(matrix_of(model, "0.weight"), dense * mask)


# Gram matrices that cannot be inverted


def singular(kind: str) -> tuple[nn.Module, list[Tensor]]:
    model, data = plain(width=20)
    for x in data:
        if kind == "duplicated":
            x[..., 7] = x[..., 3]
            x[..., 8] = 2 * x[..., 3]
        if kind == "dead":
            x[..., [2, 11]] = 0
        if kind == "few tokens":
            x[:, 1:] = x[:, :1]
    return model, data


@pytest.mark.parametrize("kind", ["duplicated", "few tokens"])
@pytest.mark.parametrize(
    "settings",
    [*({"reconstruction": method} for method in METHODS), {"score": "sparsegpt"}],
    ids=lambda settings: "-".join(settings.values()),
)
def test_damping_that_had_to_be_raised_is_noted(settings, kind):
    model, data = singular(kind)
    result = prune(model, data, PruningConfig(**settings, update="none", damping=1e-12))
    (note,) = result.notes
    assert "0.weight: the Gram matrix" in note
    assert "damping 1e-12" in note
    result.masks.verify(model)
    assert bool(matrix_of(model, "0.weight").isfinite().all())
    model, data = singular(kind)
    assert prune(model, data, PruningConfig(**settings, update="none")).notes == []


@pytest.mark.parametrize("kind", ["duplicated", "dead", "few tokens"])
@pytest.mark.parametrize("reconstruction", [None, *METHODS])
@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_singular_gram_matrices_give_sound_weights(score, reconstruction, kind):
    model, data = singular(kind)
    dense = matrix_of(model, "0.weight").clone()
    config = PruningConfig(score=score, granularity="output", reconstruction=reconstruction, swaps=0)
    result = prune(model, data, config)
    changed, inputs = matrix_of(model, "0.weight"), collect(model, data)["0.weight"]
    assert bool(changed.isfinite().all())
    assert float(changed.abs().max()) < 20 * float(dense.abs().max())
    result.masks.verify(model)
    assert result.masks.sparsity == 0.5
    if kind == "dead":  # their weights cost nothing, so they go first
        assert not bool(result.masks["0.weight"][:, [2, 11]].any())
    if reconstruction is not None:
        masked = torch.where(result.masks["0.weight"], dense, 0)
        assert reference_error(dense, changed, inputs) < reference_error(dense, masked, inputs)


def test_a_larger_damping_keeps_weights_nearer_to_what_they_were():
    moved = []
    for damping in (1e-4, 0.01, 1.0, 100.0):
        model, data = plain(width=20)
        dense = matrix_of(model, "0.weight").clone()
        mask = prune(model, data, PruningConfig(reconstruction="sequential", damping=damping)).masks["0.weight"]
        moved.append(float((matrix_of(model, "0.weight") - dense)[mask].norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.05 * moved[0]


def test_the_statistics_of_samples_one_by_one_add_up():
    model, data = plain(width=20)
    inputs = collect(model, data)["0.weight"]
    np.testing.assert_allclose(squared_norm_of(inputs), gram_of(inputs).diagonal(), rtol=1e-5)
    whole = PruningConfig(reconstruction="sequential", micro_batch_size=8)
    alone = PruningConfig(reconstruction="sequential", micro_batch_size=1)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    prune(first, data, whole)
    prune(second, data, alone)
    torch.testing.assert_close(matrix_of(first, "0.weight"), matrix_of(second, "0.weight"), rtol=1e-3, atol=1e-4)
