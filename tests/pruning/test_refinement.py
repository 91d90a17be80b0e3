from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import best_swap, reference_swap

from sparsefit.pruning import refinement
from sparsefit.pruning.refinement import swap
from sparsefit.pruning.selection import select_n_of_m

MANY = 10_000


def make_layer(inputs: int, outputs: int = 6, noise: float = 1.0, sparsity: float = 0.5, seed: int = 0):
    """Weights, a mask by Wanda's scores over the layer (rows differ in zeros) and the Gram matrix of the inputs."""
    random = np.random.default_rng(seed)
    tokens = random.normal(size=(3 * inputs, 3)) @ random.normal(size=(3, inputs))
    tokens = (tokens + noise * random.normal(size=tokens.shape)) * np.exp(0.5 * random.normal(size=inputs))
    weight = random.normal(size=(outputs, inputs))
    scores = np.abs(weight) * np.linalg.norm(tokens, axis=0)
    mask = scores > np.quantile(scores, sparsity)
    return torch.from_numpy(weight).float(), torch.from_numpy(mask), torch.from_numpy(tokens.T @ tokens).float()


def group_mask(weight: torch.Tensor, gram: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    return select_n_of_m(weight.float().abs() * gram.diagonal().sqrt(), *pattern)


def swapped_by_hand(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, max_swaps: int, group: int):
    return reference_swap(weight.double().numpy(), mask.numpy(), gram.double().numpy(), max_swaps, group)


def errors(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    pruned = weight.double() * ~mask
    return ((pruned @ gram.double()) * pruned).sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [3.0, 1.0, 0.05])
@pytest.mark.parametrize("max_swaps", [1, 3, MANY])
def test_the_best_pair_is_swapped_first(dtype, noise, max_swaps):
    weight, mask, gram = make_layer(40, outputs=4, noise=noise)
    weight = weight.to(dtype)
    refined = swap(weight, mask, gram, max_swaps)
    assert np.array_equal(refined.numpy(), swapped_by_hand(weight, mask, gram, max_swaps, 40))
    assert not torch.equal(refined, mask)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("max_swaps", [1, 3, MANY])
def test_the_best_pair_of_a_group_is_swapped_first(pattern, max_swaps):
    weight, _, gram = make_layer(32)
    mask = group_mask(weight, gram, pattern)
    refined = swap(weight, mask, gram, max_swaps, pattern)
    assert np.array_equal(refined.numpy(), swapped_by_hand(weight, mask, gram, max_swaps, pattern[1]))
    assert not torch.equal(refined, mask)


@pytest.mark.parametrize("candidates", [1, 4])
def test_every_pair_is_found_however_few_are_tried_at_once(monkeypatch, candidates):
    weight, mask, gram = make_layer(48, noise=0.05)
    expected = swap(weight, mask, gram, MANY)
    monkeypatch.setattr(refinement, "CANDIDATES", candidates)
    monkeypatch.setattr(refinement, "GRID", 2)
    monkeypatch.setattr(refinement, "CPU_ELEMENTS", 200)
    assert torch.equal(swap(weight, mask, gram, MANY), expected)
    assert torch.equal(swap(weight, mask, gram * 1e-6, MANY), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    inputs=st.integers(1, 12).map(lambda groups: 4 * groups),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
    sparsity=st.floats(0.05, 0.95),
    max_swaps=st.sampled_from([1, 2, 5, MANY]),
    pattern=st.sampled_from([None, (1, 4), (2, 4), (3, 4)]),
    dead=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_swaps_lower_the_error_and_keep_the_counts(inputs, noise, sparsity, max_swaps, pattern, dead, seed):
    weight, mask, gram = make_layer(inputs, noise=noise, sparsity=sparsity, seed=seed)
    if dead:
        gram[inputs // 2], gram[:, inputs // 2] = 0, 0
    if pattern is not None:
        mask = group_mask(weight, gram, pattern)
    refined = swap(weight, mask, gram, max_swaps, pattern)
    before, after = errors(weight, mask, gram), errors(weight, refined, gram)
    changed = (refined != mask).any(dim=1)
    assert (after[changed] < before[changed]).all()
    assert ((refined != mask).sum(dim=1) <= 2 * max_swaps).all()
    width = inputs if pattern is None else pattern[1]
    assert torch.equal(refined.view(6, -1, width).sum(dim=2), mask.view(6, -1, width).sum(dim=2))
    if max_swaps == MANY:
        for row, kept, error in zip(weight.double().numpy(), refined.numpy(), after.tolist(), strict=True):
            assert best_swap(row, kept, gram.double().numpy(), width)[0] >= error * (1 - 1e-5) - 1e-9


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_no_swaps_leave_the_mask_and_no_call_changes_its_arguments(pattern):
    weight, _, gram = make_layer(16)
    mask = group_mask(weight, gram, (2, 4))
    arguments = [argument.clone() for argument in (weight, mask, gram)]
    unchanged = swap(weight, mask, gram, 0, pattern)
    assert torch.equal(unchanged, mask)
    assert unchanged.data_ptr() != mask.data_ptr()
    swap(weight, mask, gram, 5, pattern)
    assert all(map(torch.equal, (weight, mask, gram), arguments))


@pytest.mark.parametrize("scale", [1e-3, 1000.0])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_a_factor_on_the_gram_matrix_changes_nothing(scale, pattern):
    weight, _, gram = make_layer(48)
    mask = group_mask(weight, gram, (2, 4))
    assert torch.equal(swap(weight, mask, gram, 20, pattern), swap(weight, mask, gram * scale, 20, pattern))


@pytest.mark.parametrize("value", [True, False])
def test_rows_without_a_pair_stay(value):
    weight, mask, gram = make_layer(20)
    mask[2] = value
    refined = swap(weight, mask, gram, 5)
    assert (refined[2] == value).all()
    assert not torch.equal(refined, mask)
    assert torch.equal(swap(weight, torch.full_like(mask, value), gram, 5), torch.full_like(mask, value))


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_nothing_is_swapped_where_the_inputs_say_nothing(pattern):
    weight, _, gram = make_layer(16)
    mask = group_mask(weight, gram, (2, 4))
    assert torch.equal(swap(weight, mask, torch.zeros_like(gram), 5, pattern), mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("inputs", [40, 300])
def test_a_gpu_makes_the_swaps_of_the_cpu(inputs, pattern):
    weight, mask, gram = make_layer(inputs, outputs=20)
    if pattern is not None:
        mask = group_mask(weight, gram, pattern)
    expected = swap(weight, mask, gram, 10, pattern)
    found = swap(weight.cuda(), mask.cuda(), gram.cuda(), 10, pattern).cpu()
    # Pairs that tie up to rounding may part: the errors say as much as the bits do.
    assert (found != expected).any(dim=1).sum() <= 1
    torch.testing.assert_close(errors(weight, found, gram), errors(weight, expected, gram), rtol=1e-3, atol=0)
