"""Allocation "fisher": what is measured of each matrix."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import classifier, micro_batches, smallest_half, weights_of
from torch import nn

from sparsefit.pruning.fisher import Change, prediction_changes, sensitivity
from sparsefit.pruning.predictions import labels_seed, logits_of


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
