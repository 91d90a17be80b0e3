"""Allocation "fisher": models whose predictions cannot be measured."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from fisher_cases import FISHER, IDS
from image_models import image_model, images
from tiny_models import SIZES
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sparsefit import PruningConfig, collect_statistics, prune, prune_from_statistics
from sparsefit.calibration.batches import call_model
from sparsefit.errors import CalibrationError, ConfigError


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
