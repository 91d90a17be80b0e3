"""How the sparsity is shared out: totals exact to the weight, OWL's formula, mappings."""

from __future__ import annotations

import copy
from decimal import Decimal
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_mask, reference_groups, score_of
from reference_inputs import collect, matrix_of, staged
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.errors import ConfigError
from sparsefit.pruning.allocation import by_mapping, outlier_share, owl, uniform

# Sizes that no sparsity divides evenly.
AWKWARD = {"hidden_size": 28, "intermediate_size": 41, "num_attention_heads": 2, "num_key_value_heads": 1}
SHARES = st.decimals(min_value=0, max_value=Decimal("0.999"), places=3)
SIZES = st.lists(st.integers(1, 500), min_size=1, max_size=12)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 61, (1, length), generator=generator)} for length in (12, 9, 14)]


def named(sizes: list[int]) -> dict[str, int]:
    return {f"layers.{i}.{'up' if i % 2 else 'down'}.weight": size for i, size in enumerate(sizes)}


def removed_by(masks) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.items()}


# The functions


@settings(max_examples=200, deadline=None)
@given(SIZES, SHARES)
def test_uniform_is_exact_to_the_weight(sizes, share):
    sparsity = Fraction(share)
    counts = uniform(named(sizes), sparsity)
    assert sum(counts.values()) == floor(sum(sizes) * sparsity)
    assert list(counts) == list(named(sizes))
    assert all(abs(count - size * sparsity) < 1 for count, size in zip(counts.values(), sizes, strict=True))


@settings(max_examples=200, deadline=None)
@given(SIZES, SHARES, SHARES)
def test_a_mapping_fixes_some_and_the_others_make_up_the_total(sizes, share, given_share):
    weights, sparsity, fixed = named(sizes), Fraction(share), Fraction(given_share)
    total, downs = floor(sum(sizes) * sparsity), [n for n in weights if "down" in n]
    ups = [name for name in weights if name not in downs]
    needed = total - floor(sum(weights[name] for name in downs) * fixed)
    if ups and not 0 <= needed < sum(weights[name] for name in ups):
        with pytest.raises(ConfigError, match="change the shares or the sparsity"):
            by_mapping(weights, sparsity, {"down": float(given_share)})
        return
    counts = by_mapping(weights, sparsity, {"down": float(given_share)})
    assert counts.keys() == weights.keys()
    assert all(abs(counts[name] - weights[name] * fixed) < 1 for name in downs)
    assert all(0 <= counts[name] <= weights[name] for name in weights)
    if ups:
        assert sum(counts.values()) == total
        left = Fraction(needed, sum(weights[name] for name in ups))
        assert all(abs(counts[name] - weights[name] * left) < 1 for name in ups)


@settings(max_examples=200, deadline=None)
@given(SIZES, SHARES, st.data(), st.sampled_from([0.01, 0.08, 0.5]))
def test_owl_is_exact_to_the_weight_and_keeps_more_where_more_outliers_are(sizes, share, data, spread):
    weights, sparsity = named(sizes), Fraction(share)
    groups = {name: data.draw(st.integers(0, 3)) for name in weights}
    outliers = {group: data.draw(st.floats(0, 40)) for group in sorted(set(groups.values()))}
    counts = owl(weights, groups, outliers, sparsity, spread)
    assert sum(counts.values()) == floor(sum(sizes) * sparsity)
    assert all(0 <= counts[name] <= weights[name] for name in weights)
    for a in weights:
        for b in weights:
            if outliers[groups[a]] >= outliers[groups[b]]:  # a loses no larger share, but for the rounding of each
                assert counts[a] / weights[a] <= counts[b] / weights[b] + 1 / weights[a] + 1 / weights[b] + 1e-9


def published_owl(outliers: list[float], sparsity: float, spread: float) -> np.ndarray:
    """Densities of blocks of one size, as in the paper's code."""
    ratio = np.array(outliers)
    ratio = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * spread * 2)
    return ratio - ratio.mean() + (1 - sparsity)


@pytest.mark.parametrize("spread", [0.02, 0.08, 0.15])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_owl_follows_the_published_formula(sparsity, spread):
    outliers = [3.0, 0.5, 1.7, 9.0, 0.6]
    weights = {f"{block}.{layer}.weight": size for block in range(5) for layer, size in (("a", 4001), ("b", 9999))}
    counts = owl(
        weights, {name: int(name[0]) for name in weights}, dict(enumerate(outliers)), Fraction(str(sparsity)), spread
    )
    densities = published_owl(outliers, sparsity, spread)
    for name, size in weights.items():
        assert abs((size - counts[name]) - densities[int(name[0])] * size) <= 1.01


def test_owl_with_equal_outliers_is_uniform():
    weights = named([100, 37, 55])
    counts = owl(weights, dict(zip(weights, (0, 1, 2), strict=True)), {0: 2.0, 1: 2.0, 2: 2.0}, Fraction(1, 2))
    assert counts == uniform(weights, Fraction(1, 2))


def test_the_share_of_outliers():
    first, second = torch.ones(10, 10), torch.ones(5, 20)
    first[0, :3] = 100
    second[4, 7] = 30
    mean = (97 + 300 + 99 + 30) / 200
    assert 5 * mean < 30
    assert outlier_share([first, second], 5.0) == pytest.approx(100 * 4 / 200)
    assert outlier_share([first, second], 20.0) == pytest.approx(100 * 3 / 200)


# Through `prune`


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.13, 0.5, 0.57, 0.901])
@pytest.mark.parametrize(
    "allocation", ["uniform", "owl", {"down_proj": 0.3, "layers.1.self_attn.q_proj": 0.05}], ids=str
)
@pytest.mark.parametrize("granularity", ["output", "layer", "input", ("output", 5), ("input", 9)], ids=str)
def test_totals_are_exact_whatever_is_compared(tiny_model, granularity, allocation, sparsity):
    model = tiny_model("llama", **AWKWARD)
    dense = copy.deepcopy(model)
    if isinstance(allocation, dict) and sparsity > 0.7:
        allocation = {name: 0.9 for name in allocation}
    config = PruningConfig(sparsity, allocation=allocation, granularity=granularity, update="none", micro_batch_size=1)
    result = prune(model, samples(), config)
    removed = removed_by(result.masks)
    sizes = {name: mask.numel() for name, mask in result.masks.items()}
    assert sum(removed.values()) == floor(sum(sizes.values()) * Fraction(str(sparsity)))
    result.masks.verify(model)
    axis, size = granularity if isinstance(granularity, tuple) else (granularity, 1)
    for name, weight, _, inputs in staged(dense, model, samples(), [list(result.masks)]):
        mask, groups = result.masks[name].numpy(), reference_groups(tuple(weight.shape), axis, size)
        shares = [Fraction(removed[name] * len(group), sizes[name]) for group in groups]
        counts = [int(sum(not mask[place] for place in group)) for group in groups]
        assert all(floor(share) <= count <= floor(share) + 1 for count, share in zip(counts, shares, strict=True))
        for length in {len(group) for group in groups}:
            alike = [count for count, group in zip(counts, groups, strict=True) if len(group) == length]
            assert max(alike) - min(alike) <= 1
        assert_mask(result.masks[name], *score_of("wanda", weight, inputs), counts=counts, granularity=axis, size=size)


def test_without_an_allocation_every_group_loses_the_floor_of_its_share(tiny_model):
    result = prune(tiny_model("llama", **AWKWARD), samples(), PruningConfig(0.57))
    for mask in result.masks.values():
        assert bool(((~mask).sum(dim=1) == int(mask.shape[1] * Decimal("0.57"))).all())


def block_sizes(masks) -> dict[int, tuple[int, int]]:
    """(weights, zeros) of each block."""
    sizes: dict[int, list[int]] = {}
    for name, mask in masks.items():
        sizes.setdefault(int(name.split(".")[2]), [0, 0])
        sizes[int(name.split(".")[2])][0] += mask.numel()
        sizes[int(name.split(".")[2])][1] += int((~mask).sum())
    return {block: (size, zeros) for block, (size, zeros) in sizes.items()}


@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize(
    ("score", "threshold", "spread"), [("wanda", 5.0, 0.08), ("magnitude", 3.0, 0.15), ("sparsegpt", 2.0, 0.05)]
)
def test_owl_from_the_outliers_of_the_dense_model(tiny_model, score, threshold, spread, update):
    model = tiny_model("llama", num_hidden_layers=4)
    with torch.no_grad():  # outliers in some blocks more than in others
        for layer, factor in enumerate((1, 9, 3, 20)):
            model.model.layers[layer].mlp.up_proj.weight[:factor] *= factor
    dense = copy.deepcopy(model)
    inputs = collect(dense, samples())
    outliers = []
    for layer in range(4):
        names = [name for name in inputs if name.startswith(f"model.layers.{layer}.")]
        scores = np.concatenate([score_of("wanda", matrix_of(dense, n), inputs[n])[0].ravel() for n in names])
        outliers.append(100 * float((scores > threshold * scores.mean()).mean()))
    assert len(set(outliers)) == 4
    config = PruningConfig(
        0.6,
        score=score,
        allocation="owl",
        owl_threshold=threshold,
        owl_spread=spread,
        update=update,
        micro_batch_size=1,
    )
    result = prune(model, samples(), config)
    assert result.update == (update if score != "magnitude" else "none")  # which needs no inputs for its masks
    sizes = block_sizes(result.masks)
    densities = published_owl(outliers, 0.6, spread)
    for block, (size, zeros) in sizes.items():
        assert abs((size - zeros) - densities[block] * size) <= 8  # each of seven matrices is rounded
    assert np.argsort([size - zeros for size, zeros in sizes.values()]).tolist() == np.argsort(outliers).tolist()
    for name, mask in result.masks.items():
        assert abs(float(mask.float().mean()) - densities[int(name.split(".")[2])]) <= 1.01 / mask.numel() + 1e-6


@pytest.mark.parametrize("sparsity", [0.02, 0.95, 0.99])
def test_owl_near_nothing_and_everything_cuts_densities_off_and_keeps_the_total(tiny_model, sparsity):
    model = tiny_model("llama")
    result = prune(model, samples(), PruningConfig(sparsity, allocation="owl", owl_threshold=2.0, owl_spread=0.2))
    sizes = block_sizes(result.masks)
    total = sum(size for size, _ in sizes.values())
    assert sum(zeros for _, zeros in sizes.values()) == floor(total * Fraction(str(sparsity)))
    assert len({zeros / size for size, zeros in sizes.values()}) > 1
    extremes = {0.0} if sparsity < 0.5 else {1.0}
    assert extremes & {zeros / size for size, zeros in sizes.values()}
    result.masks.verify(model)


def test_owl_takes_a_layer_outside_the_blocks_as_a_block_of_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20)).eval()
    with torch.no_grad():
        model[2].weight[:2] *= 30
    masks = prune(model, [torch.randn(9, 20)], PruningConfig(allocation="owl", update="none", targets="*")).masks
    assert masks.sparsity == 0.5
    assert float(masks["2.weight"].float().mean()) == pytest.approx(0.58, abs=0.002)


@pytest.mark.parametrize("reconstruction", ["sequential", "iterative", "least_squares"])
@pytest.mark.parametrize("allocation", ["uniform", "owl", {"down_proj": 0.3}], ids=str)
def test_totals_are_exact_where_weights_change(tiny_model, allocation, reconstruction):
    model = tiny_model("llama", **AWKWARD)
    config = PruningConfig(0.57, allocation=allocation, reconstruction=reconstruction, score="sparsegpt")
    result = prune(model, samples(), config)
    removed, sizes = removed_by(result.masks), {name: mask.numel() for name, mask in result.masks.items()}
    assert sum(removed.values()) == floor(sum(sizes.values()) * Fraction("0.57"))
    result.masks.verify(model)


def test_iterative_counts_add_up_over_the_blocks_of_columns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(301, 7), nn.Linear(7, 5)).eval()
    config = PruningConfig(0.57, allocation="uniform", reconstruction="iterative", score="sparsegpt", targets="*")
    masks = prune(model, [torch.randn(400, 301)], config).masks
    assert sum(removed_by(masks).values()) == floor((301 * 7 + 35) * Fraction("0.57"))
    by_columns = [float((~part).float().mean()) for part in masks["0.weight"].split(128, dim=1)]
    assert by_columns == pytest.approx([0.57] * 3, abs=0.005)


MAPPING_ERRORS = [
    ({"up_porj": 0.3}, 0.5, "allocation names 'up_porj'"),
    ({"self_atn": 0.3}, 0.5, "allocation names 'self_atn'"),
    ({"mlp.down_proj": 0.999, "up_proj": 0.999, "gate_proj": 0.999}, 0.2, "change the shares or the sparsity"),
    ({"down_proj": 0.0, "up_proj": 0.0, "gate_proj": 0.0}, 0.9, "change the shares or the sparsity"),
]


@pytest.mark.parametrize(("allocation", "sparsity", "cause"), MAPPING_ERRORS, ids=str)
def test_mappings_that_do_not_fit_change_nothing(tiny_model, allocation, sparsity, cause):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=cause):
        prune(model, samples(), PruningConfig(sparsity, allocation=allocation))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_longest_name_of_a_mapping_counts(tiny_model):
    allocation = {"model.layers.1.mlp.down_proj": 0.0, "down_proj": 0.25, "mlp.down_proj": 0.75}
    masks = prune(tiny_model("llama"), samples(), PruningConfig(allocation=allocation)).masks
    shares = {n: float((~mask).float().mean()) for n, mask in masks.items() if "down_proj" in n}
    assert list(shares.values()) == [0.75, 0.0, 0.75]
    assert masks.sparsity == pytest.approx(0.5, abs=1e-4)


def test_a_mapping_of_all_layers_needs_no_sparsity(tiny_model):
    allocation = {name: 0.25 for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")} | {
        "down_proj": 0.75
    }
    masks = prune(tiny_model("llama"), samples(), PruningConfig(allocation=allocation)).masks
    for name, mask in masks.items():
        assert float((~mask).float().mean()) == (0.75 if "down_proj" in name else 0.25)
