"""Sparsity shared out by the Fisher information: what is measured, how it becomes counts, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction
from math import floor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from image_models import image_model, images
from peft import LoraConfig, get_peft_model
from tiny_models import SIZES, make_tiny_model, two_blocks
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sparsefit import PruningConfig, collect_statistics, prune, prune_from_statistics
from sparsefit.calibration.batches import MicroBatch, call_model
from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning.allocation import by_change, uniform
from sparsefit.pruning.fisher import Change, prediction_changes, sensitivities, sensitivity
from sparsefit.pruning.input_groups import Part
from sparsefit.pruning.layers import matrices_of
from sparsefit.pruning.predictions import labels_seed, logits_of
from sparsefit.pruning.scores import SCORES, computed, register_score
from sparsefit.pruning.statistics import InputStatistics

FISHER = PruningConfig(0.5, allocation="fisher")
IDS = torch.randint(3, 61, (6, 12), generator=torch.Generator().manual_seed(1))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


def weights_of(model: nn.Module) -> list:
    return [weight for name, module in model.named_modules() for weight in matrices_of(module, name)]


def smallest_half(model: nn.Module) -> dict[str, torch.Tensor]:
    matrices = {weight.name: weight.matrix() for weight in weights_of(model)}
    return {name: matrix.abs() < matrix.abs().median(1, keepdim=True).values for name, matrix in matrices.items()}


def micro_batches(inputs: torch.Tensor) -> list[MicroBatch]:
    return [MicroBatch(part, (0,) * len(part)) for part in inputs.split(8)]


def counts_of(result) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in result.masks.items()}


# What is measured


def test_a_change_is_that_of_all_labels_weighted_by_their_probabilities():
    """The exact mean over labels and samples, by enumeration, where the implementation draws one label for each."""
    model, inputs = classifier(), torch.randn(600, 6, generator=torch.Generator().manual_seed(2))
    removed = smallest_half(model)
    found = prediction_changes(weights_of(model), removed, micro_batches(inputs), model)
    for name, gone in removed.items():
        parameter, whole, rows = model.get_parameter(name), 0.0, torch.zeros(len(gone))
        for sample in inputs:
            logs = model(sample).log_softmax(0)
            for log in logs:
                (gradient,) = torch.autograd.grad(log, parameter, retain_graph=True)
                change = (gradient * parameter * gone).detach().sum(1)
                whole += float(log.exp() * change.sum().square()) / 2 / len(inputs)
                rows += (log.exp() * change.square()).detach() / 2 / len(inputs)
        assert found[name].whole == pytest.approx(whole, rel=0.25)
        assert found[name].rows.tolist() == pytest.approx(rows.tolist(), rel=0.35)


def test_it_is_close_to_the_divergence_that_pruning_causes():
    model, inputs = classifier(), torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
    removed = smallest_half(model)
    found = prediction_changes(weights_of(model), removed, micro_batches(inputs), model)
    for name, gone in removed.items():
        pruned = copy.deepcopy(model)
        with torch.no_grad():
            pruned.get_parameter(name).masked_fill_(gone, 0)
            dense, now = model(inputs).log_softmax(1), pruned(inputs).log_softmax(1)
        divergence = float(F.kl_div(now, dense, log_target=True, reduction="batchmean"))
        assert found[name].whole == pytest.approx(divergence, rel=0.5)


def test_gradients_and_what_requires_them_are_left_as_they_were():
    model, inputs = classifier(), torch.randn(4, 6)
    model[0].weight.requires_grad_(False)
    model[2].weight.grad, model[2].bias.grad = torch.ones(4, 5), torch.ones(4)
    prediction_changes(weights_of(model), smallest_half(model), micro_batches(inputs), model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model[0].weight.grad is None
    assert bool((model[2].weight.grad == 1).all())
    assert bool((model[2].bias.grad == 1).all())


def test_positions_of_padding_do_not_count():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    assert torch.equal(logits_of(SimpleNamespace(logits=logits), mask), logits[0, [0, 2]])


def test_scales_weigh_rows_and_leave_the_sum_of_the_matrix():
    squared, gone = torch.rand(7, 30), torch.rand(7, 30) < 0.4
    change = Change(3.0, torch.rand(7))
    curve, scales = sensitivity(squared, gone, change)
    weighted = (squared * gone * scales[:, None].square()).sum(1)
    assert float(weighted.sum()) == pytest.approx(float((squared * gone).sum()))
    lost = (squared * gone).sum(1)
    half = lost / lost.sum() / 2 + change.rows / change.rows.sum() / 2
    torch.testing.assert_close(weighted / weighted.sum(), half)
    per_weight = torch.sort((squared * scales[:, None].square()).flatten()).values.double() * 3 / float(lost.sum())
    torch.testing.assert_close(curve, per_weight, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 1.0])])
def test_rows_without_a_change_or_without_inputs(rows):
    assert sensitivity(torch.zeros(4, 5), torch.ones(4, 5).bool(), Change(0.0, rows)) is None
    _, scales = sensitivity(torch.ones(4, 5), torch.ones(4, 5).bool(), Change(1.0, rows))
    assert bool((scales > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_default_dtype_of_half_precision_changes_nothing(dtype):
    """Lightning's true half precisions set it while the model runs."""
    squared, gone = torch.rand(64, 300), torch.rand(64, 300) < 0.5
    change = Change(3.0, torch.rand(64))
    expected = sensitivity(squared, gone, change)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = sensitivity(squared, gone, change)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.curve, expected.curve)
    assert torch.equal(found.scales, expected.scales)


def test_an_optimizer_in_the_backward_pass_takes_no_step():
    model, inputs = classifier(), torch.randn(4, 6)
    before, steps = copy.deepcopy(model.state_dict()), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: (steps.append(p), p.data.sub_(p.grad)))
    prediction_changes(weights_of(model), smallest_half(model), micro_batches(inputs), model)
    assert not steps
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_probabilities_are_as_good_as_their_logits():
    model, inputs = classifier(), torch.randn(40, 6)
    with_softmax = nn.Sequential(*model, nn.Softmax(-1))
    removed, data = smallest_half(model), micro_batches(inputs)
    expected = prediction_changes(weights_of(model), removed, data, model)
    found = prediction_changes(weights_of(model), removed, data, with_softmax)
    for name in expected:
        assert found[name].whole == pytest.approx(expected[name].whole, rel=0.02)


def test_the_padding_of_a_decoder_is_its_own():
    output = SimpleNamespace(logits=torch.randn(1, 3, 5, requires_grad=True), encoder_last_hidden_state=torch.ones(1))
    of_encoder = torch.tensor([[True, False, True]])
    own = torch.tensor([[1, 1, 0]])
    assert len(logits_of(output, of_encoder, {"decoder_attention_mask": own})) == 2
    assert len(logits_of(output, of_encoder, {"labels": torch.tensor([[3, -100, -100]])})) == 1
    assert len(logits_of(output, of_encoder, {})) == 3


def test_labels_are_drawn_by_the_inputs():
    inputs, mask = torch.arange(4).view(1, 4), torch.ones(1, 4)
    seed = labels_seed({"input_ids": inputs})
    assert labels_seed({"labels": torch.zeros(1), "attention_mask": mask, "input_ids": inputs}) == seed
    assert labels_seed({"input_ids": inputs + 1}) != seed


# Counts


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


# Through `prune`


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


# What cannot be measured


class Hidden(nn.Module):
    """A model whose `forward` returns a given value."""

    def __init__(self, output) -> None:
        super().__init__()
        self.net, self.output = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), output

    def forward(self, x):
        return self.output(self.net(x))


@pytest.mark.parametrize(
    ("output", "reported"),
    [
        (lambda y: SimpleNamespace(last_hidden_state=y), "gets SimpleNamespace"),
        (lambda y: y.sum(), r"gets a tensor \(\)"),
        (lambda y: y[:, :1], r"gets a tensor \(6, 1\)|gets a tensor \(1, 1\)"),
        (lambda y: y.detach(), "without a gradient"),
        (lambda y: {"loss": y.sum()}, "gets dict"),
        (lambda y: y.unflatten(0, (1, -1)), r"gets a tensor \(1, [16], 4\)"),
        (lambda y: (y.unflatten(0, (1, -1)),), "gets tuple"),
    ],
)
def test_a_model_without_logits_is_refused_and_left_as_it_was(output, reported):
    model = Hidden(output)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=f"needs the logits .*{reported}.*use allocation 'owl'"):
        prune(model, [torch.randn(6, 6)], PruningConfig(allocation="fisher", update="none", targets="*"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_logits_that_are_not_finite_are_an_error():
    model = Hidden(lambda y: y * torch.inf)
    with pytest.raises(CalibrationError, match="logits for a calibration sample are NaN"):
        prune(model, [torch.randn(6, 6)], PruningConfig(allocation="fisher", update="none", targets="*"))


class NaNBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def test_gradients_that_are_not_finite_are_an_error():
    model = Hidden(NaNBackward.apply)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"the gradients of net\.0\.weight .* are NaN"):
        prune(model, [torch.randn(6, 6)], PruningConfig(allocation="fisher", update="none", targets="*"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_logits_that_reach_no_weight_are_an_error():
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.bias = nn.Linear(6, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.net(x).detach() + self.bias

    with pytest.raises(ConfigError, match="those of the logits reach no weight"):
        prune(Bias(), [torch.randn(6, 6)], PruningConfig(allocation="fisher", update="none", targets="*"))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_predictions_that_are_not_one_of_several_classes_are_refused(problem):
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3, problem_type=problem))
    with pytest.raises(ConfigError, match=f"problem_type of .* is {problem}: use allocation 'owl'"):
        prune(model, [{"input_ids": IDS}], FISHER)


def test_statistics_hold_no_gradients():
    model = image_model("DeiT")
    statistics = collect_statistics(model, [images()], [])
    with pytest.raises(ConfigError, match=r"'fisher' needs gradients .* call `prune`"):
        prune_from_statistics(model, statistics, PruningConfig(allocation="fisher", update="none"))


def test_a_quantized_model_is_refused():
    quantized = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(quantized.nn.Linear4bit(64, 64), nn.Linear(64, 4)).to("cpu")
    with pytest.raises(ConfigError, match=r"0\.weight is quantized: use allocation 'owl'"):
        prune(model, [torch.randn(6, 64)], PruningConfig(allocation="fisher", update="none", targets="*"))


def test_the_forward_that_is_given_makes_the_logits():
    model = Hidden(lambda y: SimpleNamespace(last_hidden_state=y))

    def forward(batch):
        return call_model(model, batch).last_hidden_state

    config = PruningConfig(allocation="fisher", update="none", targets="*")
    assert prune(model, [torch.randn(6, 6)], config, forward=forward).masks.sparsity == 0.5
