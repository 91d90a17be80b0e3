"""The same samples give the same masks, however they are cut into batches and wherever they are kept."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_mask, gram_of, reference_mask, score_of
from reference_inputs import collect
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.errors import ConfigError
from sparsefit.pruning.refinement import swap

WIDTH = 16
METHODS = {
    "wanda": {},
    "wanda layer": {"granularity": "layer"},
    "wanda_l1": {"score": "wanda_l1"},
    "wanda_linf": {"score": "wanda_linf", "pattern": "2:4"},
    "ria": {"score": "ria"},
    "sparsegpt": {"score": "sparsegpt", "granularity": "output"},
    "SparseGPT": {"score": "sparsegpt", "reconstruction": "iterative"},
    "swaps": {"swaps": 4},
    "sequential": {"reconstruction": "sequential"},
    "least_squares": {"reconstruction": "least_squares", "pattern": "2:4"},
    "owl": {"allocation": "owl"},
    "fisher": {"allocation": "fisher"},
}
METHODS |= {name: METHODS[name.split(",")[0]] | {"update": "none"} for name in ("wanda, dense", "sparsegpt, dense")}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


# Samples of several lengths: those next to each other in one batch are of the same.
LENGTHS = (7, 7, 7, 5, 5, 9, 9, 9, 9, 7)


@functools.cache
def samples() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(1, length, WIDTH, generator=generator) for length in LENGTHS)


def cut_at(cuts: set[int]) -> list[Tensor]:
    """The samples in batches, cut at least where the length changes."""
    edges = sorted({0, len(LENGTHS)} | cuts | {i for i in range(1, len(LENGTHS)) if LENGTHS[i] != LENGTHS[i - 1]})
    return [torch.cat(samples()[start:end]) for start, end in itertools.pairwise(edges)]


def pruned(batches: list[Tensor], **config) -> tuple[str, list[Tensor]]:
    model = network()

    def forward(batch: Tensor) -> Tensor:
        return model(batch).flatten(0, 1)  # (predictions, classes)

    result = prune(model, batches, PruningConfig(**config), forward=forward)
    return result.masks.digest(), [p.detach() for p in model.parameters()]


@functools.cache
def one_by_one(method: str, size: int) -> tuple[str, list[Tensor]]:
    return pruned(list(samples()), **METHODS[method], micro_batch_size=size)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=5, deadline=None)
@given(cuts=st.sets(st.integers(1, len(LENGTHS) - 1)), size=st.sampled_from([1, 2, 3, 8]))
def test_the_cut_of_the_batches_changes_no_bit(method, cuts, size):
    digest, weights = pruned(cut_at(cuts), **METHODS[method], micro_batch_size=size)
    expected, same = one_by_one(method, size)
    assert digest == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


@pytest.mark.parametrize(
    "place", [{"device": "cpu"}, {"states_on_cpu": True}, {"device": "cpu", "states_on_cpu": True}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_where_blocks_are_computed_and_states_kept_changes_no_bit(method, place):
    digest, weights = pruned(list(samples()), **METHODS[method], **place, micro_batch_size=3)
    expected, same = one_by_one(method, 3)
    assert digest == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "t5", "mixtral"])
def test_device_and_states_of_transformers(tiny_model, architecture, update):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (4, 9), generator=generator)
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if architecture == "t5" else {})
    plain = prune(tiny_model(architecture), [batch], PruningConfig(update=update, micro_batch_size=2))
    moved = PruningConfig(update=update, micro_batch_size=2, device="cpu", states_on_cpu=True)
    result = prune(tiny_model(architecture), [batch], moved)
    assert result.masks.digest() == plain.masks.digest()
    assert result.update == update
    assert result.notes == plain.notes


def test_a_device_needs_blocks_to_take_there():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="leave out `device`"):
        prune(model, [torch.randn(3, 4)], PruningConfig(device="cpu"))


@pytest.mark.parametrize(
    "place", [{}, {"device": "cpu"}, {"score": "sparsegpt", "granularity": "output"}, {"swaps": 2}], ids=str
)
def test_layers_outside_the_blocks_see_the_dense_network_too_where_that_was_asked_for(place):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = network(), nn.Linear(WIDTH, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(x))

    torch.manual_seed(0)
    model = Model().eval()
    dense, inputs = model.head.weight.detach().clone(), collect(model, samples())["head.weight"]
    config = PruningConfig(**place, update="none", targets=("up", "down", "head"), micro_batch_size=1)
    mask = prune(model, list(samples()), config).masks["head.weight"]
    if "swaps" in place:
        start = torch.from_numpy(reference_mask(score_of("wanda", dense, inputs)[0]))
        assert torch.equal(mask, swap(dense, start, torch.from_numpy(gram_of(inputs)).float(), 2))
    else:
        assert_mask(mask, *score_of(place.get("score", "wanda"), dense, inputs))


@pytest.mark.parametrize("update", ["block", "none"])
def test_all_samples_count_where_a_block_takes_them_one_by_one(update):
    class OneByOne(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.stack([self.down(self.up(sample).tanh()) for sample in x])

    def pruned(size: int) -> tuple[str, int]:
        torch.manual_seed(0)
        model = nn.Sequential(*(OneByOne() for _ in range(2)))
        data = torch.randn(8, 5, WIDTH) * torch.linspace(0.1, 3, 8)[:, None, None]
        result = prune(model, [data], PruningConfig(update=update, micro_batch_size=size))
        return result.masks.digest(), result.tokens

    assert pruned(8) == pruned(1)
    assert pruned(8)[1] == 8 * 5
