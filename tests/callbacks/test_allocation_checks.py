"""A fit refuses an allocation that its model does not allow before it spends time on the dense model."""

from __future__ import annotations

import pytest
import torch
from pruned_fits import Watch
from small_runs import Classifier, fit, labelled
from torch import nn

from sparsefit.callbacks import WandaPruning
from sparsefit.callbacks import pruning as callback
from sparsefit.errors import ConfigError


class Predicts(Classifier):
    """Calibrates with a method of its own."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def calibration_step(self, batch):
        return self.output(self(batch[0]))


def refused(module, told):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    required = {name: p.requires_grad for name, p in module.named_parameters()}
    watch = Watch()
    with pytest.raises(ConfigError, match=told):
        fit(module, labelled(), WandaPruning(allocation="fisher"), watch, max_steps=0)
    assert watch.events == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {name: p.requires_grad for name, p in module.named_parameters()} == required


@pytest.mark.parametrize(
    ("output", "told"), [(lambda y: y.sum(), r"gets a tensor \(\)"), (torch.detach, "without a gradient")]
)
def test_a_model_without_logits_is_not_evaluated_first(output, told):
    refused(Predicts(output), f"needs the logits .*{told}")


def test_a_frozen_model_is_measured_and_stays_frozen():
    module = Predicts(lambda y: y)
    module.model.requires_grad_(False)
    module.model.head.requires_grad_(True)
    watch = Watch()
    fit(module, labelled(), WandaPruning(allocation="fisher"), watch, max_steps=0)
    assert watch.events == ["start", "end"]
    assert {name for name, p in module.model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_a_quantized_model_is_not_evaluated_first():
    quantized = pytest.importorskip("bitsandbytes")
    module = Classifier()
    module.model.blocks[1].up = quantized.nn.Linear8bitLt(8, 16, has_fp16_weights=False)
    module.to("cpu")
    module.configure_optimizers = lambda: torch.optim.SGD(module.model.head.parameters(), lr=0.1)
    refused(module, r"blocks\.1\.up\.weight is quantized: use allocation 'owl'")


def test_a_quantized_weight_that_no_sample_reaches_does_not_matter():
    quantized = pytest.importorskip("bitsandbytes")
    module = Classifier()
    module.model.unused = nn.ModuleList(quantized.nn.Linear8bitLt(8, 16, has_fp16_weights=False) for _ in range(2))
    module.to("cpu")
    module.configure_optimizers = lambda: torch.optim.SGD(module.model.head.parameters(), lr=0.1)
    pruning = WandaPruning(allocation="fisher")
    fit(module, labelled(), pruning, max_steps=0)
    assert pruning.result.left_dense["model.unused.0.weight"]


def test_a_sharded_model_is_not_evaluated_first(monkeypatch):
    monkeypatch.setattr(callback, "units_of", lambda module: [module])
    refused(Classifier(), "the model is sharded over ranks: use allocation 'owl'")
