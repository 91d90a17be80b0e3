"""`DenseControl` in a loop of one's own."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule
from small_runs import Classifier, fit, labelled
from torch import nn

from sparsefit.callbacks import DenseControl, GPUHourBudget, RunReport, WandaPruning
from sparsefit.errors import ConfigError, DivergenceError


class Measured(Classifier):
    def __init__(self):
        super().__init__(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
        self.metrics = {"accuracy": "higher", "loss": "lower"}

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.05, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def evaluate(self, batches, progress):
        (x, y), *_ = batches
        logits = self(x)
        return {
            "accuracy": float((logits.argmax(1) == y).float().mean()),
            "loss": float(nn.functional.cross_entropy(logits, y)),
        }


class Shuffled(LightningDataModule):
    """Its order is that of torch's own generator."""

    def train_dataloader(self):
        return labelled(24, shuffle=True)

    def test_dataloader(self):
        return labelled(64, seed=5, batch_size=64)


def run(folder, *callbacks, sparsity=0.5, **settings):
    report = RunReport(folder)
    module = Measured()
    fit(module, Shuffled(), WandaPruning(sparsity), report, *callbacks, **settings)
    return report, module


def test_it_repeats_the_training(tmp_path):
    torch.manual_seed(7)
    report, trained = run(tmp_path / "run", sparsity=0.0, max_epochs=3)
    torch.manual_seed(8)
    control = Measured()
    fit(control, Shuffled(), DenseControl(report), max_epochs=3)
    assert len(control.seen) == len(trained.seen) == 18
    assert all(map(torch.equal, control.seen, trained.seen))
    assert all(map(torch.equal, control.parameters(), trained.parameters()))
    written = json.loads((tmp_path / "run/report.json").read_text())
    assert written["loss"]["control"] == written["loss"]["recovered"]
    assert written["control"]["distance"] == {"accuracy": 0.0, "loss": 0.0}
    assert written["control"]["steps"] == 18


def test_it_takes_the_steps_and_rates_that_a_budget_left(tmp_path):
    torch.manual_seed(7)

    class Rates(Measured):
        def __init__(self):
            super().__init__()
            self.rates = []

        def configure_optimizers(self):
            return self.optimizer(self.parameters())

        def on_train_batch_end(self, *args):
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    report, trained, control = RunReport(tmp_path / "run"), Rates(), Rates()
    budget = GPUHourBudget(1.0, warmup_steps=3)
    fit(trained, Shuffled(), WandaPruning(0.5), report, budget, max_epochs=-1, max_steps=5)
    fit(control, Shuffled(), DenseControl(report), max_epochs=4)
    assert len(control.seen) == 5
    assert control.rates == trained.rates
    assert len(set(trained.rates)) > 2


def test_what_is_no_control_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no training to be a control of"):
        fit(Measured(), Shuffled(), DenseControl(RunReport(tmp_path / "none")))
    report, pruned = run(tmp_path / "run")
    before = (tmp_path / "run/report.json").read_bytes()
    for module, callbacks, message in (
        (pruned, (), "the module is pruned already"),
        (Measured(), (WandaPruning(0.5),), "a control is not pruned"),
        (Measured(), (GPUHourBudget(1.0),), "leave GPUHourBudget out"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(module, Shuffled(), DenseControl(report), *callbacks)
    assert (tmp_path / "run/report.json").read_bytes() == before


class Diverging(Measured):
    def training_step(self, *args):
        return super().training_step(*args) * float("nan")


def test_a_control_that_diverges_is_stopped_and_reported(tmp_path):
    report, _ = run(tmp_path / "run", max_steps=2)
    with pytest.raises(DivergenceError, match="Lower the learning rate"):
        fit(Diverging(), Shuffled(), DenseControl(report), max_steps=2)
    reported = json.loads((tmp_path / "run/report.json").read_text())["control"]
    assert (reported["status"], reported["steps"]) == ("failed", 0)
    assert "DivergenceError" in reported["error"]
