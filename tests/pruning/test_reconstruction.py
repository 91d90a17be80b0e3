from __future__ import annotations

import numpy as np
import pytest
import torch
from activations import DAMPING, assert_close, damped, gram_of, layer, real_like_inputs

from sparsefit.errors import CalibrationError
from sparsefit.pruning import least_squares as least_squares_module
from sparsefit.pruning.gram import reconstruction_error
from sparsefit.pruning.least_squares import least_squares
from sparsefit.pruning.selection import select_n_of_m
from sparsefit.pruning.weight_updates import (
    inverse_diagonal,
    inverse_factor,
    prune_iteratively,
    update_sequentially,
)


def prune_n_of_m(weight, factor, n, m):
    def choose(weights, _, diagonal):
        return select_n_of_m(weights.square().div_(diagonal.square()), n, m)

    return prune_iteratively(weight, factor, choose, group=m, keep=n)


def reference_sweep(weight, system, choose, block_size):
    """Optimal brain surgeon, one row and one column at a time, each with a fresh inverse of what is still free."""
    work, kept = weight.astype(np.float64).copy(), np.ones(weight.shape, dtype=bool)
    inputs = work.shape[1]
    inverses = [np.linalg.inv(system[j:, j:]) for j in range(inputs)]
    for j in range(inputs):
        if j % block_size == 0:
            columns = range(j, min(j + block_size, inputs))
            kept[:, columns] = choose(work[:, columns], columns, np.sqrt([inverses[c][0, 0] for c in columns]))
        for row in np.flatnonzero(~kept[:, j]):
            work[row, j:] -= work[row, j] / inverses[j][0, 0] * inverses[j][0]
            work[row, j] = 0
    return kept, work


def smallest_half(weights, columns, diagonal):
    """True = kept: all weights of the block compete."""
    score = (np.asarray(weights) / np.asarray(diagonal)) ** 2
    return score > np.sort(score, axis=None)[score.size // 2 - 1]


def two_of_four(weights, columns, diagonal):
    score = (np.asarray(weights) / np.asarray(diagonal)) ** 2
    return score >= np.sort(score, axis=1)[:, 2:3]


# --- the factor


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_factor_squares_to_the_damped_inverse(damping, scale):
    gram = gram_of(real_like_inputs(50)) * scale
    factor = inverse_factor(gram, damping)
    assert factor.damping == damping
    assert torch.equal(factor.upper, factor.upper.triu())
    assert not factor.dead.any()
    inverse = np.linalg.inv(damped(gram, damping))
    assert_close(factor.upper.double().T @ factor.upper.double(), inverse)
    factor = inverse_factor(gram, damping)
    diagonal, used = inverse_diagonal(factor), factor.damping
    assert used == damping
    np.testing.assert_allclose(diagonal.numpy(), np.diag(inverse), rtol=1e-3)


@pytest.mark.parametrize("asked", [0.0, 1e-9])
def test_damping_rises_where_inputs_depend_on_each_other(asked):
    gram = gram_of(real_like_inputs(60, noise=0.0))
    factor = inverse_factor(gram, asked)
    assert asked < factor.damping < 0.01
    assert factor.upper.isfinite().all()
    assert_close(factor.upper.double().T @ factor.upper.double(), np.linalg.inv(damped(gram, factor.damping)), 1e-2)


def test_damping_rises_where_only_rounding_tells_two_inputs_apart():
    gram = torch.tensor([[1, 1 - 2**-24], [1 - 2**-24, 1]])
    weight, mask = torch.tensor([[1.0, 1.0]]), torch.tensor([[True, True]])
    assert inverse_factor(gram, 0.0).damping > 0
    assert inverse_factor(gram, 1e-5).damping == 1e-5
    assert least_squares(weight, mask, gram)[1] > 0


def test_damping_of_sparsegpt_is_enough_for_inputs_that_depend_on_each_other():
    assert inverse_factor(gram_of(real_like_inputs(60, noise=0.0)), 0.01).damping == 0.01


def test_dead_inputs_change_nothing_for_the_others():
    tokens = real_like_inputs(20)
    tokens[:, [3, 11]] = 0
    live = np.delete(np.arange(20), [3, 11])
    gram = gram_of(tokens)
    factor = inverse_factor(gram)
    assert factor.dead.nonzero().flatten().tolist() == [3, 11]
    inverse = np.linalg.inv(damped(gram)[np.ix_(live, live)])
    assert_close((factor.upper.double().T @ factor.upper.double())[live][:, live], inverse)
    diagonal = inverse_diagonal(inverse_factor(gram))
    assert diagonal.isinf().nonzero().flatten().tolist() == [3, 11]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_gram_matrix_of_zeros_has_a_factor(damping):
    factor = inverse_factor(torch.zeros(5, 5), damping)
    assert factor.dead.all()
    assert factor.upper.isfinite().all()
    assert (factor.upper.diagonal() > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", [inverse_factor, lambda gram: least_squares(*layer(2, 4), gram)])
def test_infinite_activations_are_an_error(function, value):
    gram = torch.eye(4)
    gram[1, 2] = value
    with pytest.raises(CalibrationError, match="not finite"):
        function(gram)


# --- column by column


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_sequential_update_is_the_optimal_brain_surgeons(dtype, block_size):
    weight, mask = layer(6, 50, dtype)
    gram = gram_of(real_like_inputs(50))
    updated = update_sequentially(weight, mask, inverse_factor(gram, DAMPING), block_size)
    _, expected = reference_sweep(
        weight.double().numpy(), damped(gram), lambda _, columns, __: mask.numpy()[:, columns], 50
    )
    assert updated.dtype == torch.float32
    assert (updated[~mask] == 0).all()
    assert_close(updated, expected)
    ours = reconstruction_error(weight, updated, gram)
    reference = reconstruction_error(weight, torch.from_numpy(expected), gram)
    assert (ours <= reference * 1.001).all()
    assert ours.sum() < 0.8 * reconstruction_error(weight, weight * mask, gram).sum()


def test_kept_weights_of_dead_inputs_stay():
    weight, mask = layer(6, 20)
    tokens = real_like_inputs(20)
    tokens[:, 5] = 0
    mask[:3, 5], mask[3:, 5] = True, False
    gram = gram_of(tokens)
    for changed in (update_sequentially(weight, mask, inverse_factor(gram)), least_squares(weight, mask, gram)[0]):
        assert torch.equal(changed[:, 5], weight[:, 5] * mask[:, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "block_size"), [(48, 128), (48, 16), (50, 16)])
def test_masks_are_chosen_on_updated_weights(dtype, inputs, block_size):
    weight, _ = layer(8, inputs, dtype)
    gram = gram_of(real_like_inputs(inputs))
    seen = []

    def choose(weights, columns, diagonal):
        seen.append((columns.start, columns.start + weights.shape[1]))
        return torch.from_numpy(smallest_half(weights, columns, diagonal))

    mask, updated = prune_iteratively(weight, inverse_factor(gram, DAMPING), choose, block_size)
    expected_mask, expected = reference_sweep(weight.double().numpy(), damped(gram), smallest_half, block_size)
    assert seen == [(start, min(start + block_size, inputs)) for start in range(0, inputs, block_size)]
    assert np.array_equal(mask.numpy(), expected_mask)
    assert (updated[~mask] == 0).all()
    assert_close(updated, expected)


@pytest.mark.parametrize("block_size", [2, 4, 10, 128])
def test_groups_are_chosen_as_they_come(block_size):
    weight, _ = layer(8, 48)
    gram = gram_of(real_like_inputs(48))
    factor = inverse_factor(gram, DAMPING)
    mask, updated = prune_iteratively(
        weight, factor, lambda *block: torch.from_numpy(two_of_four(*block)), block_size, 4
    )
    expected_mask, expected = reference_sweep(weight.double().numpy(), damped(gram), two_of_four, 4)
    assert (mask.view(8, -1, 4).sum(dim=2) == 2).all()
    assert np.array_equal(mask.numpy(), expected_mask)
    assert_close(updated, expected)


def test_iterative_pruning_sets_weights_of_dead_inputs_to_zero_first():
    weight, _ = layer(8, 32)
    tokens = real_like_inputs(32)
    tokens[:, 9] = 0
    factor = inverse_factor(gram_of(tokens))

    def choose(weights, columns, diagonal):
        assert (weights[:, 9] == 0).all()
        return torch.ones_like(weights, dtype=torch.bool)

    mask, updated = prune_iteratively(weight, factor, choose)
    weight[:, 9] = 0
    assert mask.all()
    assert torch.equal(updated, weight)


# --- all of them


def test_no_update_beats_least_squares_and_each_beats_no_update():
    weight, mask = layer(16, 64)
    gram = gram_of(real_like_inputs(64))
    masked = reconstruction_error(weight, weight * mask, gram)
    sequential = reconstruction_error(weight, update_sequentially(weight, mask, inverse_factor(gram)), gram)
    best = reconstruction_error(weight, least_squares(weight, mask, gram)[0], gram)
    assert (best <= sequential * (1 + 1e-4)).all()
    assert (best <= masked).all()
    assert sequential.sum() < masked.sum()


def test_error_is_that_of_the_outputs():
    tokens = real_like_inputs(30)
    weight, mask = layer(5, 30, torch.bfloat16)
    expected = (((weight * mask).double().numpy() - weight.double().numpy()) @ tokens.T) ** 2
    found = reconstruction_error(weight, weight * mask, gram_of(tokens))
    np.testing.assert_allclose(found.numpy(), expected.sum(axis=1), rtol=1e-5)
    assert (reconstruction_error(weight, weight, gram_of(tokens)) == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1000.0])
def test_a_factor_on_the_gram_matrix_changes_nothing(scale):
    weight, mask = layer(8, 48)
    tokens = real_like_inputs(48)
    tokens[:, 5] = 0
    gram = gram_of(tokens)

    def outcomes(gram):
        factor = inverse_factor(gram)
        chosen, iterative = prune_iteratively(weight, factor, lambda *b: torch.from_numpy(smallest_half(*b)), 16)
        return chosen, iterative, update_sequentially(weight, mask, factor), least_squares(weight, mask, gram, 0.01)[0]

    (chosen, *expected), (chosen_scaled, *found) = outcomes(gram), outcomes(gram * scale)
    assert torch.equal(chosen, chosen_scaled)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other.double().numpy(), 1e-5)


# --- N:M by its own score


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 6)])
def test_n_of_m_is_the_loop_with_sparsegpts_score(n, m):
    weight, _ = layer(8, 48)
    gram = gram_of(real_like_inputs(48))
    mask, updated = prune_n_of_m(weight, inverse_factor(gram, DAMPING), n, m)

    def choose(weights, _, diagonal):
        scores = (np.asarray(weights) / np.asarray(diagonal)) ** 2
        return scores >= np.sort(scores, axis=1)[:, m - n : m - n + 1]

    expected_mask, expected = reference_sweep(weight.double().numpy(), damped(gram), choose, m)
    assert np.array_equal(mask.numpy(), expected_mask)
    assert_close(updated, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_comes_to_the_results_of_the_cpu(dtype, monkeypatch):
    weight, mask = layer(40, 300, dtype)
    gram = gram_of(real_like_inputs(300, tokens=900))
    monkeypatch.setattr(least_squares_module, "DIRECT_WORK", 0)  # all rows together
    outcomes = []
    for device in ("cpu", "cuda"):
        weight, mask, gram = weight.to(device), mask.to(device), gram.to(device)
        factor = inverse_factor(gram)
        outcomes.append(
            (
                update_sequentially(weight, mask, factor, 200),
                prune_n_of_m(weight, factor, 2, 4)[1],
                prune_iteratively(weight, factor, lambda block, *_: block.abs() > 0.5)[1],
            )
        )
    for expected, found in zip(*outcomes, strict=True):
        assert_close(found.cpu(), expected.double().numpy(), 1e-3)
    exact = least_squares(weight.cpu(), mask.cpu(), gram.cpu(), DAMPING)[0]
    together = least_squares(weight, mask, gram, DAMPING)[0].cpu()
    lowest, reached = (reconstruction_error(weight.cpu(), values, gram.cpu()).sum() for values in (exact, together))
    assert reached <= 1.01 * lowest
