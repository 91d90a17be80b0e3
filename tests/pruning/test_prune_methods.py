"""`prune` with every score, granularity and pattern against a brute force on whole-model passes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from reference import SCORES, assert_mask, score_of
from reference_inputs import collect, matrix_of, staged
from torch import Tensor, nn

from sparsefit import PruningConfig, prune

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTHS = (9, 12, 7)
DTYPES = [torch.float32, torch.bfloat16]
GRANULARITIES = ["output", "layer", "input", ("output", 3), ("input", 5), ("input", 7), "variant"]
PATTERNS = ["2:4", "1:4", "3:5"]


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 61, (1, length), generator=generator)} for length in LENGTHS]


def stages_of(model: nn.Module, update: str) -> list[list[str]]:
    names = [name for name in collect(model, samples()[:1]) if "layers." in name]
    if update == "none":
        return [names]
    return [list(block) for _, block in itertools.groupby(names, key=lambda name: name.split(".")[2])]


def check(model: nn.Module, config: PruningConfig, granularity: str | tuple[str, int] = "output") -> None:
    """The masks are those of the brute force; kept weights are unchanged, bit for bit, and pruned ones are zero."""
    dense = copy.deepcopy(model)
    result = prune(model, samples(), config)
    axis, size = granularity if isinstance(granularity, tuple) else (granularity, 1)
    selection = {"sparsity": config.sparsity, "pattern": config.pattern, "granularity": axis, "size": size}
    walk = list(stages_of(model, config.update))
    assert {name for names in walk for name in names} == set(result.masks)
    for name, weight, changed, inputs in staged(dense, model, samples(), walk):
        mask = result.masks[name]
        assert mask.shape == weight.shape
        assert_mask(mask, *score_of(config.score, weight, inputs), **selection)
        assert torch.equal(changed, torch.where(mask, weight, 0)), name
    assert result.notes == []


@pytest.mark.parametrize(
    ("sparsity", "dtype"), [(0.5, torch.float32), (0.57, torch.float32), (0.57, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_unstructured_masks(tiny_model, score, granularity, sparsity, dtype):
    model = tiny_model("llama", **SIZES).to(dtype)
    check(model, PruningConfig(sparsity, score=score, granularity=granularity, micro_batch_size=1), granularity)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("score", SCORES)
def test_n_of_m_masks(tiny_model, score, pattern, dtype):
    model = tiny_model("llama", **SIZES).to(dtype)
    check(model, PruningConfig(pattern=pattern, score=score, micro_batch_size=1))


@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("granularity", ["layer", ("input", 128), "variant"], ids=str)
def test_patterns_compare_in_their_groups_whatever_the_granularity(tiny_model, granularity, update):
    config = PruningConfig(pattern="2:4", granularity=granularity, update=update, micro_batch_size=1)
    check(tiny_model("llama", **SIZES), config)


@pytest.mark.parametrize(
    ("score", "granularity", "pattern"),
    [
        ("wanda", "output", None),
        ("wanda", "layer", None),
        ("magnitude", "input", None),
        ("sparsegpt", ("input", 7), None),
        ("sparsegpt", "output", "2:4"),
        ("ria", ("output", 3), None),
        ("wanda_l1", "variant", None),
        ("wanda_linf", "output", "3:5"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_from_the_dense_network(tiny_model, score, granularity, pattern, dtype):
    config = PruningConfig(pattern=pattern, score=score, granularity=granularity, update="none", micro_batch_size=1)
    check(tiny_model("llama", **SIZES).to(dtype), config, granularity)


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.95, 0.999])
@pytest.mark.parametrize("granularity", ["output", "layer", ("input", 3)], ids=str)
def test_sparsities_near_nothing_and_everything(tiny_model, granularity, sparsity):
    config = PruningConfig(sparsity, granularity=granularity, micro_batch_size=1)
    check(tiny_model("llama", **SIZES), config, granularity)


@pytest.mark.parametrize("score", ["wanda", "magnitude", "wanda_linf"])
def test_ties_go_from_the_lowest_column(score):
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 7)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-1.0, 1.0]).repeat(6, 5))
    dense, data = copy.deepcopy(model), [torch.ones(1, 10)]
    result = prune(model, data, PruningConfig(0.37, score=score, granularity="output"))
    assert_mask(result.masks["0.weight"], *score_of(score, dense[0].weight.detach(), data), sparsity=0.37)
    assert result.masks["0.weight"].tolist() == [[False] * 3 + [True] * 7] * 6


@pytest.mark.parametrize("reconstruction", [None, "sequential", "least_squares", "iterative"])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_works_with_every_update_of_weights(tiny_model, score, reconstruction):
    model = tiny_model("llama", **SIZES)
    result = prune(model, samples(), PruningConfig(score=score, reconstruction=reconstruction, granularity="output"))
    result.masks.verify(model)
    counts = {(~mask).sum(dim=1).unique().tolist()[0] / mask.shape[1] for mask in result.masks.values()}
    assert counts == {0.5}
    for name, mask in result.masks.items():
        assert int((matrix_of(model, name) != 0).sum()) == int(mask.sum())
