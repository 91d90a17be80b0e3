"""Allocation "fisher": how many weights each matrix loses, from given changes and through `prune`."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch
from fisher_cases import FISHER, IDS, classifier, counts_of, micro_batches, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from image_models import image_model, images
from peft import LoraConfig, get_peft_model
from tiny_models import make_tiny_model, two_blocks
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.calibration.batches import MicroBatch
from sparsefit.pruning.allocation import by_change, uniform
from sparsefit.pruning.fisher import sensitivities
from sparsefit.pruning.input_groups import Part
from sparsefit.pruning.scores import SCORES, computed, register_score
from sparsefit.pruning.statistics import InputStatistics


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40), st.floats(0, 5)), min_size=1, max_size=8),
    st.sampled_from(["0", "0.05", "0.37", "0.5", "0.9", "0.999"]),
    st.sampled_from([0.0, 0.05, 0.15, 0.5, 1.0]),
    st.randoms(use_true_random=False),
)
def test_totals_are_exact_and_shares_within_the_spread(matrices, sparsity, spread, random):
    sizes = {str(number): rows * inputs for number, (rows, inputs, _) in enumerate(matrices)}
    changes = {
        str(number): torch.tensor(sorted(scale * random.random() for _ in range(inputs)), dtype=torch.float64)
        for number, (_, inputs, scale) in enumerate(matrices)
    }
    share = Fraction(sparsity)
    counts = by_change(sizes, changes, share, spread)
    assert sum(counts.values()) == floor(sum(sizes.values()) * share)
    for name, size in sizes.items():
        assert 0 <= counts[name] <= size
        assert abs(counts[name] - size * share) <= size * spread + 1


def test_the_weights_that_change_least_go_first():
    """Without a limit of the spread the matrices lose what a sort of all changes would take."""
    generator = torch.Generator().manual_seed(0)
    changes = {str(k): (torch.rand(50, generator=generator).double() * (k + 1)).sort().values for k in range(4)}
    sizes = dict.fromkeys(changes, 3 * 50)  # three rows each
    merged = sorted((float(change), name) for name, own in changes.items() for change in own)
    for taken in (20, 100, 163):
        counts = by_change(sizes, changes, Fraction(taken, 200), spread=1.0)
        assert counts == {name: 3 * sum(one == name for _, one in merged[:taken]) for name in sizes}


def test_equal_changes_or_no_spread_are_uniform():
    sizes = {"a": 30, "b": 77}
    changes = {"a": torch.zeros(10).double(), "b": torch.zeros(11).double()}
    assert by_change(sizes, changes, Fraction(1, 2), 0.3) == uniform(sizes, Fraction(1, 2))
    changes["a"] += 1
    assert by_change(sizes, changes, Fraction(1, 2), 0.0) == uniform(sizes, Fraction(1, 2))


def test_a_matrix_without_a_curve_loses_the_same_share():
    changes = {"a": torch.tensor([1.0, 2.0]).double(), "b": torch.tensor([3.0, 6.0]).double()}
    sizes = {"a": 20, "unknown": 30, "b": 20}
    counts = by_change(sizes, changes, Fraction(1, 2), 0.5)
    assert list(counts.items()) == [("a", 20), ("unknown", 15), ("b", 0)]
    assert by_change(sizes, {}, Fraction(1, 3), 0.5) == uniform(sizes, Fraction(1, 3))


@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2", "bert", "t5"])
def test_language_models(architecture, update):
    model = make_tiny_model(architecture)
    batch = {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :5]} if architecture == "t5" else {})
    config = PruningConfig(0.6, allocation="fisher", update=update, fisher_spread=0.1)
    result = prune(model, [batch], config)
    sizes = {name: mask.numel() for name, mask in result.masks.items()}
    counts = counts_of(result)
    assert sum(counts.values()) == floor(sum(sizes.values()) * Fraction("0.6"))
    assert all(abs(counts[name] - 0.6 * size) <= 0.1 * size + 1 for name, size in sizes.items())
    assert len({counts[name] / sizes[name] for name in sizes}) > 3
    result.masks.verify(model)


@pytest.mark.parametrize("architecture", ["ConvNext", "DeiT"])
def test_image_classifiers(architecture):
    model = image_model(architecture)
    result = prune(model, [images(6)], PruningConfig(0.5, allocation="fisher", update="none", granularity="layer"))
    shares = [float((~mask).float().mean()) for mask in result.masks.values()]
    assert max(shares) - min(shares) > 0.05
    assert result.masks.sparsity == pytest.approx(0.5, abs=1e-4)


def test_under_autocast_and_an_adapter_the_base_is_measured():
    model = get_peft_model(two_blocks("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    with torch.autocast("cpu", torch.bfloat16):
        adapted = prune(model, [{"input_ids": IDS}], FISHER)
        plain = prune(two_blocks("llama"), [{"input_ids": IDS}], FISHER)
    assert list(counts_of(adapted).values()) == list(counts_of(plain).values())
    assert len({int((~mask).sum()) for mask in adapted.masks.values()}) > 5
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)


def test_the_same_samples_give_the_same_counts_however_they_are_cut():
    alone = prune(two_blocks("llama"), [{"input_ids": row[None]} for row in IDS], FISHER)
    joined = prune(two_blocks("llama"), [{"input_ids": IDS[:4]}, {"input_ids": IDS[4:]}], FISHER)
    assert alone.masks.digest() == joined.masks.digest()


def test_masks_remove_the_smallest_scaled_scores_of_each_matrix():
    """By a stable sort of each whole matrix, with the statistics and scales of the dense network."""
    model, inputs = classifier(), torch.randn(40, 6, generator=torch.Generator().manual_seed(4))
    dense, config = copy.deepcopy(model), PruningConfig(allocation="fisher", update="none", targets="*")
    masks = prune(model, [inputs], config).masks
    seen = {"0.weight": inputs, "2.weight": dense[:2](inputs).detach()}
    statistics = {name: InputStatistics(x.shape[1], x.device) for name, x in seen.items()}
    for name, x in seen.items():
        statistics[name].add(x)
    weights = weights_of(dense)
    parts = {weight.name: [Part(slice(0, weight.shape[0]), statistics[weight.name])] for weight in weights}
    found = sensitivities(weights, parts, config, [MicroBatch(inputs, (0,) * 40)], dense)
    for weight in weights:
        scores = weight.matrix().abs() * seen[weight.name].norm(dim=0) * found[weight.name].scales[:, None]
        going = scores.flatten().argsort(stable=True)[: int((~masks[weight.name]).sum())]
        assert set(going.tolist()) == set((~masks[weight.name]).flatten().nonzero().flatten().tolist())


def test_progress_counts_the_passes():
    steps = []
    prune(two_blocks("llama"), [{"input_ids": IDS}], FISHER, progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert len({total for _, total in steps}) == 1


@pytest.mark.parametrize("score", ["wanda", "ria", "magnitude", "sparsegpt"])
def test_a_score_and_its_square_give_the_same_masks(score):
    registered = SCORES[score]
    SCORES["square"] = registered._replace(
        function=lambda *a: computed(registered.function(*a)).square(), degree=2 * registered.degree
    )
    try:
        masks = [
            prune(two_blocks("llama"), [{"input_ids": IDS}], replace(FISHER, score=name, update="none")).masks.digest()
            for name in (score, "square")
        ]
    finally:
        del SCORES["square"]
    assert masks[0] == masks[1]


def test_a_score_of_unknown_degree_competes_as_its_authors_say():
    """Negative scores, such as logarithms, must not be multiplied by a factor of the row."""
    register_score("log_wanda", lambda weight, norm: (weight.float().abs() * norm.sqrt()).clamp_min(1e-30).log())
    try:
        config = PruningConfig(0.5, score="log_wanda", allocation="fisher")
        assert config.granularity == "output"
        masks = prune(two_blocks("llama"), [{"input_ids": IDS}], config).masks
    finally:
        del SCORES["log_wanda"]
    wanda = prune(two_blocks("llama"), [{"input_ids": IDS}], replace(FISHER, granularity="output")).masks
    assert masks.digest() == wanda.digest()


def test_existing_zeros_cost_nothing_and_are_not_what_is_measured():
    """A matrix that has lost its share already is not taken for one that means nothing."""
    model, inputs = classifier(), torch.randn(60, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model[2].weight[:, :3] = 0
    config = PruningConfig(0.5, allocation="fisher", existing_zeros="keep", update="none", targets="*")
    statistics = {"0.weight": inputs, "2.weight": model[:2](inputs).detach()}
    weights = weights_of(model)
    parts = {}
    for weight in weights:
        own = InputStatistics(weight.shape[1], inputs.device)
        own.add(statistics[weight.name])
        parts[weight.name] = [Part(slice(0, weight.shape[0]), own)]
    found = sensitivities(weights, parts, config, micro_batches(inputs), model)
    assert bool((found["2.weight"].curve[12:] > 0).all())
    assert prune(model, [inputs], config).masks.sparsity == 0.5


class Frozen(nn.Module):
    """A classifier whose first layer runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.net = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        with torch.no_grad():
            hidden = self.body(x)
        return self.net(hidden)


def test_a_matrix_that_no_gradient_reaches_loses_its_share_and_a_note_says_so():
    result = prune(Frozen(), [torch.randn(30, 6)], PruningConfig(allocation="fisher", update="none", targets="*"))
    assert counts_of(result)["body.weight"] == 24
    assert sum(counts_of(result).values()) == (48 + 64 + 24) // 2
    assert any("body.weight" in note and "no gradient" in note for note in result.notes)


def test_a_recurrent_classifier():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    result = prune(Tagger(), [torch.randn(9, 5, 6)], PruningConfig(allocation="fisher", update="none", targets="lstm"))
    assert result.masks.sparsity == 0.5
