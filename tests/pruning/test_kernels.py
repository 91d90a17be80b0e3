"""Compares the Triton kernels with the tensor operations that they replace, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparsefit.pruning import refinement, weight_updates
from sparsefit.pruning.selection import Products, select_n_of_m
from sparsefit.pruning.weight_updates import inverse_factor, prune_iteratively, update_sequentially

pytest.importorskip("triton", reason="Triton is not installed; the tensor operations are tested without it")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU; test_kernels_in_the_interpreter runs these on the CPU"
)

if DEVICE == "cuda" or INTERPRETED:
    from sparsefit.pruning import selection_kernels as kernels
    from sparsefit.pruning import update_kernels


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # before Triton is imported: hence another process
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-5000:]


def matrix(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if kind == "tied":
        values = values.mul(1.5).round()
    elif kind == "zeros":
        values = torch.where(values > 0, 0.0, -0.0)
    elif kind == "constant":
        values = torch.full(shape, -0.25)
    elif kind == "tiny":  # float32 products below the smallest normal number
        values = values * 1e-4
    return values.to(dtype)


def factor_of(kind: str, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(inputs)
    factor = torch.rand(inputs, generator=generator).mul(8).exp()
    return factor.round() if kind == "tied" else factor * 1e-37 if kind == "tiny" else factor


def mask_of_stable_sort(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = scores.sort(dim=1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


KINDS = ["random", "tied", "zeros", "constant", "tiny"]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 300), (1, 17), (2, 1030)])
def test_rows_lose_their_smallest_scores(shape, kind, dtype):
    weight, factor = matrix(kind, shape, dtype), factor_of(kind, shape[1])
    for count in (1, shape[1] // 2, shape[1] - 1):
        for products in (Products(weight), Products(weight, factor)):
            found = kernels.mask_of_smallest(*operands(products), count)
            assert torch.equal(found.cpu(), mask_of_stable_sort(products.scores(), count))
        found = kernels.mask_of_smallest(*on_device(weight, None), count)
        assert torch.equal(found.cpu(), mask_of_stable_sort(weight.float(), count))


def operands(products: Products) -> list[torch.Tensor]:
    """The values and the factor of their magnitudes, of which a single one is repeated."""
    return on_device(products.weight, torch.ones(1) if products.factor is None else products.factor)


def on_device(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


@runs_kernels
def test_groups_of_rows_repeat_the_factor():
    weight, factor = matrix("tied", (6, 40), torch.bfloat16), factor_of("tied", 40)
    found = kernels.mask_of_smallest(*on_device(weight.view(2, 120), factor), 50)
    assert torch.equal(found.cpu(), mask_of_stable_sort(Products(weight, factor).scores().view(2, 120), 50))
    assert torch.equal(Products(weight.view(2, 120), factor).scores(), Products(weight, factor).scores().view(2, 120))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", ["random", "tied", "tiny"])
@pytest.mark.parametrize("shape", [(1, 20_480), (2, 10_001)])
def test_long_rows_lose_their_smallest_scores(monkeypatch, shape, kind, dtype):
    monkeypatch.setattr(kernels, "WIDEST_ROW", 1000)
    inputs = 2048 if shape[1] % 2048 == 0 else shape[1]
    weight, factor = matrix(kind, shape, dtype), factor_of("random", inputs)
    if kind == "tied":
        weight = matrix("random", shape, torch.float32).mul(30).round().to(dtype)
    for count in (1, shape[1] // 2):
        for products in (Products(weight), Products(weight, factor)):
            found = kernels.mask_of_smallest(*operands(products), count)
            assert torch.equal(found.cpu(), mask_of_stable_sort(products.scores(), count))
        found = kernels.mask_of_smallest(*on_device(weight, None), count)
        assert torch.equal(found.cpu(), mask_of_stable_sort(weight.float(), count))


@runs_kernels
@pytest.mark.parametrize("kind", ["constant", "zeros", "half zeros", "wide", "signed", "infinite"])
def test_long_rows_of_equal_or_far_scores(monkeypatch, kind):
    monkeypatch.setattr(kernels, "WIDEST_ROW", 1000)
    values = matrix(kind, (1, 20_000), torch.float32)
    if kind == "half zeros":
        values = torch.where(values > 0, values, 0)
    elif kind == "wide":  # the range of the sample is nearly all there is
        values = values.sign() * 10.0 ** (values * 20)
    elif kind == "infinite":
        values = torch.where(values.abs() > 0.5, values / 0, values)
    for count in (0, 1, 9_000, 10_100, 20_000):
        found = kernels.mask_of_smallest(values.to(DEVICE), None, count)
        assert torch.equal(found.cpu(), mask_of_stable_sort(values, count))


@runs_kernels
@pytest.mark.parametrize("width", [3, 8, 30])
def test_the_sample_may_be_the_whole_row(monkeypatch, width):
    monkeypatch.setattr(kernels, "WIDEST_ROW", 2)
    for kind in ("random", "tied", "constant"):
        values = matrix(kind, (2, width), torch.float32)
        for count in range(width + 1):
            found = kernels.mask_of_smallest(values.to(DEVICE), None, count)
            assert torch.equal(found.cpu(), mask_of_stable_sort(values, count))


@runs_kernels
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sample_may_mislead(monkeypatch, sign):
    monkeypatch.setattr(kernels, "WIDEST_ROW", 1000)
    monkeypatch.setattr(kernels, "SAMPLE", 256)
    values = torch.arange(39_936.0)[None]
    values[:, :: 39_936 // 256 | 1] += sign * 1e6
    for count in (1, 5_000, 20_000, 35_000, 39_936):
        found = kernels.mask_of_smallest(values.to(DEVICE), None, count)
        assert torch.equal(found.cpu(), mask_of_stable_sort(values, count))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "tied", "zeros"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:5", "20:40"])
def test_groups_lose_their_smallest_scores(pattern, kind, dtype):
    n, m = map(int, pattern.split(":"))
    weight, factor = matrix(kind, (5, 6 * m), dtype), factor_of(kind, 6 * m)
    for products in (Products(weight), Products(weight, factor)):
        found = kernels.n_of_m(*operands(products), n, m)
        assert torch.equal(found.cpu(), select_n_of_m(products.scores(), n, m))
    found = kernels.n_of_m(*on_device(weight, None), n, m)
    assert torch.equal(found.cpu(), select_n_of_m(weight, n, m))


@runs_kernels
def test_matrices_need_not_be_contiguous_and_may_be_empty():
    weight = matrix("tied", (64, 12), torch.float32).t()
    found = kernels.mask_of_smallest(weight.to(DEVICE), None, 20)
    assert torch.equal(found.cpu(), mask_of_stable_sort(weight, 20))
    assert torch.equal(kernels.n_of_m(weight.to(DEVICE), None, 2, 4).cpu(), select_n_of_m(weight, 2, 4))
    assert kernels.n_of_m(torch.ones(0, 8, device=DEVICE), None, 2, 4).shape == (0, 8)
    assert kernels.mask_of_smallest(torch.ones(0, 8, device=DEVICE), None, 2).shape == (0, 8)


def layer(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, a mask whose rows differ in zeros, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(inputs)
    tokens = torch.randn(3 * inputs, 3, generator=generator) @ torch.randn(3, inputs, generator=generator)
    tokens = (tokens + torch.randn(tokens.shape, generator=generator)) * torch.rand(inputs, generator=generator).exp()
    weight = torch.randn(outputs, inputs, generator=generator)
    scores = weight.abs() * tokens.norm(dim=0)
    return weight, scores > scores.median(), tokens.T @ tokens


def factor_on_device(factor: weight_updates.Factor) -> weight_updates.Factor:
    return factor._replace(upper=factor.upper.to(DEVICE), dead=factor.dead.to(DEVICE))


@runs_kernels
@pytest.mark.parametrize(("outputs", "inputs", "block_size"), [(20, 50, 16), (3, 40, 1), (17, 72, 128)])
def test_the_update_is_the_loop_over_columns(monkeypatch, outputs, inputs, block_size):
    weight, mask, gram = layer(outputs, inputs)
    factor = inverse_factor(gram)
    expected = update_sequentially(weight, mask, factor, block_size)
    monkeypatch.setattr(weight_updates, "triton_works", lambda device: True)
    found = update_sequentially(*on_device(weight, mask), factor_on_device(factor), block_size)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert (found.cpu()[~mask] == 0).all()


@runs_kernels
@pytest.mark.parametrize(("n", "m", "block_size"), [(2, 4, 16), (4, 8, 32), (2, 5, 10), (1, 2, 2)])
def test_the_update_chooses_groups_as_they_come(monkeypatch, n, m, block_size):
    weight, _, gram = layer(19, 40)
    factor = inverse_factor(gram)

    def choose(weights, _, diagonal):
        return select_n_of_m(weights.square() / diagonal.square(), n, m)

    mask, expected = prune_iteratively(weight, factor, choose, block_size, m)
    monkeypatch.setattr(weight_updates, "triton_works", lambda device: True)
    kept, found = prune_iteratively(weight.to(DEVICE), factor_on_device(factor), choose, block_size, m, keep=n)
    assert torch.equal(kept.cpu(), mask)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("inputs", [5, 40, 130])
def test_the_best_pair_is_found(inputs):
    weight, mask, gram = layer(9, inputs)
    weight, own = weight.double(), gram.double()
    rows = refinement._Rows(
        torch.arange(9), mask, weight, weight.masked_fill(mask, 0) @ own, weight**2 * own.diagonal()
    )
    changes = refinement._changes(rows)
    reach = refinement._strongest_correlation(gram)
    added, removed = update_kernels.best_pair(*on_device(*changes, gram, reach), refinement.GRID)
    gain, loss, value = changes
    change = gain[:, :, None] + loss[:, None, :] - 2 * value[:, :, None] * value[:, None, :] * gram
    best, place = change.flatten(1).min(dim=1)
    improves = best < 0
    assert improves.any()
    assert torch.equal(added.cpu()[improves], (place // inputs)[improves])
    assert torch.equal(removed.cpu()[improves], (place % inputs)[improves])
