"""Kept weights by least squares: row by row, and, as on a GPU, all rows together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from activations import assert_close, damped, gram_of, layer, real_like_inputs

from sparsefit.pruning import least_squares as least_squares_module
from sparsefit.pruning.gram import reconstruction_error, unit_gram
from sparsefit.pruning.least_squares import _solve_together, least_squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.3, 0.03])
def test_least_squares_is_the_minimiser(dtype, noise):
    tokens = real_like_inputs(40, noise=noise)
    weight, mask = layer(9, 40, dtype)
    mask[0], mask[1] = True, False
    gram = gram_of(tokens)
    solved, used = least_squares(weight, mask, gram)
    assert used == 0
    assert (solved[~mask] == 0).all()
    ours = ((solved.double().numpy() - weight.double().numpy()) @ tokens.T) ** 2
    for row, kept in enumerate(mask.numpy()):
        target = tokens @ weight[row].double().numpy()
        best, *_ = np.linalg.lstsq(tokens[:, kept], target, rcond=None)
        lowest = ((tokens[:, kept] @ best - target) ** 2).sum()
        assert ours[row].sum() <= lowest * 1.001 + 1e-9 * (target**2).sum()
    assert torch.equal(solved[0], weight[0].float())


def test_damping_pulls_towards_the_original_weights():
    weight, mask = layer(6, 30)
    gram = gram_of(real_like_inputs(30))
    solved, used = least_squares(weight, mask, gram, 0.2)
    assert used == 0.2
    system, pull = damped(gram, 0.2), 0.2 * gram.double().diagonal().mean().item()
    for row, kept in enumerate(mask.numpy()):
        original = weight[row].double().numpy()
        right = (gram.double().numpy() @ original)[kept] + pull * original[kept]
        assert_close(solved[row, mask[row]], np.linalg.solve(system[np.ix_(kept, kept)], right))


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_least_squares_of_dependent_inputs_takes_damping_and_stays_finite(noise):
    weight, mask = layer(12, 60)
    gram = gram_of(real_like_inputs(60, noise=noise))
    solved, used = least_squares(weight, mask, gram)
    assert 0 < used < 0.01
    assert solved.isfinite().all()
    assert solved.abs().max() < 100 * weight.abs().max()
    before = reconstruction_error(weight, weight * mask, gram)
    assert (reconstruction_error(weight, solved, gram) <= before).all()
    assert reconstruction_error(weight, solved, gram).sum() < 0.1 * before.sum()


def test_least_squares_of_a_gram_matrix_of_zeros_keeps_the_weights():
    weight, mask = layer(4, 10)
    solved, used = least_squares(weight, mask, torch.zeros(10, 10))
    assert used == 0
    assert torch.equal(solved, weight * mask)


def test_memory_for_temporaries_does_not_change_the_solution(monkeypatch):
    weight, mask = layer(9, 40)
    gram = gram_of(real_like_inputs(40))
    whole, _ = least_squares(weight, mask, gram)
    for limit in (1, 100_000):
        monkeypatch.setattr(least_squares_module, "TEMPORARY_BYTES", limit)
        assert_close(least_squares(weight, mask, gram)[0], whole.double().numpy(), 1e-5)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize(("power", "outliers"), [(1.0, 3), (1.5, 0), (2.0, 3)])
def test_rows_solved_together_come_within_a_percent_of_the_exact_solution(power, outliers, damping, monkeypatch):
    """Inputs as large language models have them: a spectrum of a power law, and features 30 times as large."""
    generator = torch.Generator().manual_seed(0)
    inputs = 256
    directions = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q
    spectrum = torch.arange(1.0, inputs + 1).pow(-power / 2)
    tokens = (torch.randn(4 * inputs, inputs, generator=generator) * spectrum) @ directions.T
    tokens[:, :outliers] *= 30
    gram = tokens.T @ tokens
    weight, mask = layer(24, inputs)
    mask[0], mask[1] = True, False
    monkeypatch.setattr(least_squares_module, "ROWS_TOGETHER", 10)
    monkeypatch.setattr(least_squares_module, "STRONG_DIRECTIONS", 16)
    exact, _ = least_squares(weight, mask, gram, damping)
    found = _solve_together(weight, mask, unit_gram(gram)[0], damping)
    assert (found[~mask] == 0).all()
    assert torch.equal(found[0], weight[0])
    lowest, reached = (reconstruction_error(weight, values, gram) for values in (exact, found))
    assert reached.sum() <= 1.01 * lowest.sum()
    assert (reached <= 1.05 * lowest + 1e-6 * reconstruction_error(weight, 0 * weight, gram)).all()


def test_rows_solved_together_keep_what_no_change_makes_better():
    weight, mask = layer(4, 10)
    assert torch.equal(_solve_together(weight, mask, torch.eye(10, dtype=torch.float64), 0.0), weight * mask)
    dead = gram_of(real_like_inputs(10))
    dead[3], dead[:, 3] = 0, 0
    solved = _solve_together(weight, mask, unit_gram(dead)[0], 0.0)
    assert solved.isfinite().all()
    torch.testing.assert_close(solved[:, 3], weight[:, 3] * mask[:, 3])
