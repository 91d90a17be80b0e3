"""The report of a module that declares no figures: those of its own validation."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from small_runs import QUIET, Classifier, fit, labelled
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from sparsefit.callbacks import RunReport, WandaPruning
from sparsefit.errors import ConfigError
from sparsefit.modules import RecoveryMixin
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter
from sparsefit.recovery.distill import DistillSettings
from sparsefit.recovery.inspection import inspect_folder

pytestmark = pytest.mark.figures


class Own(Classifier):
    """A plain network with a validation of its own."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_accuracy", self.accuracy)
        self.log_dict({"val_loss": nn.functional.cross_entropy(logits, y), "unasked": 1.0})
        if self.logger is not None:
            self.logger.experiment  # noqa: B018


class Rows(LightningDataModule):
    def train_dataloader(self):
        return labelled(16)

    def val_dataloader(self):
        return labelled(10, seed=9)


class Count(Callback):
    validations = 0

    def on_validation_end(self, trainer, module):
        self.validations += not trainer.sanity_checking


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def measured(module):
    trainer = Trainer(**QUIET)
    return trainer.validate(module, Rows(), verbose=False)[0]


def test_it_measures_what_the_trainer_validates(tmp_path):
    dense, module, count = measured(Own()), Own(), Count()
    trainer = fit(module, Rows(), WandaPruning(0.5), RunReport(tmp_path / "run"), count, max_epochs=3)
    report = report_of(tmp_path / "run")
    assert report["metrics"] == {"val_accuracy": "higher", "val_loss": "lower"}
    after = measured(module)
    for name in ("val_accuracy", "val_loss"):
        assert report[name]["dense"] == pytest.approx(dense[name])
        assert report[name]["recovered"] == pytest.approx(after[name])
        assert set(report[name]) == {"dense", "pruned", "recovered"}
    assert report["val_loss"]["pruned"] != report["val_loss"]["dense"]
    noted = [point["stage"] for point in report["timeline"] if point["metric"] == "val_loss"]
    assert noted == ["dense", "pruned", "validation", "validation", "validation", "recovered"]
    assert count.validations == 3
    assert trainer.global_step == report["training"]["steps"]
    assert report["sparsity"]["total"] == inspect_folder(tmp_path / "run").sparsity == 0.5
    assert "val_accuracy" in (tmp_path / "run/report.html").read_text()


def test_it_changes_nothing_of_the_training(tmp_path):
    def run(*callbacks):
        module = Own()
        stop = EarlyStopping("val_loss", patience=2)
        logger = CSVLogger(tmp_path, name=str(len(callbacks)))
        torch.manual_seed(3)
        settings = {"max_epochs": 6, "logger": logger, "num_sanity_val_steps": 0}
        trainer = fit(module, Rows(), WandaPruning(0.5), stop, *callbacks, **settings)
        rows = (tmp_path / str(len(callbacks)) / "version_0/metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("val_loss")
        return module.state_dict(), trainer, [row.split(",")[column] for row in rows[1:] if row.split(",")[column]]

    alone, trainer, logged = run()
    reported, other, logged_too = run(RunReport(tmp_path / "run"))
    assert all(torch.equal(alone[name], reported[name]) for name in alone if name.startswith("model."))
    assert trainer.global_step == other.global_step
    assert logged == logged_too
    assert trainer.callback_metrics.keys() == other.callback_metrics.keys()


def test_declared_metrics_are_those_that_count(tmp_path):
    module = Own()
    module.metrics = {"accuracy": "higher"}
    fit(module, Rows(), WandaPruning(0.5), RunReport(tmp_path / "run"), max_epochs=1)
    report = report_of(tmp_path / "run")
    assert report["metrics"] == {"accuracy": "higher"}
    assert set(report["accuracy"]) == {"dense", "pruned", "recovered"}
    assert "val_loss" not in report


def test_a_module_without_a_validation_is_not_measured(tmp_path):
    fit(Classifier(), labelled(16), WandaPruning(0.5), RunReport(tmp_path / "run"), max_epochs=1)
    assert report_of(tmp_path / "run")["metrics"] == {}


class Taught(RecoveryMixin, Own):
    """The same with adapters and a dense teacher."""

    def __init__(self, weight=0.5, form="masked_lora") -> None:
        super().__init__()
        self.model = attach_adapter(self.model, AdapterSettings(form, r=2, dropout=0.0, target_modules="all-linear"))
        self.distill = DistillSettings(weight=weight)
        self.taught_logits = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        taught = self.taught(self.model, x)
        self.taught_logits.append((x, taught.clone()))
        logits = self.model(x)
        return self.distilled(nn.functional.cross_entropy(logits, y), logits, taught)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["masked_lora", "hira", "full"])
def test_adapters_and_a_dense_teacher_in_a_module_of_ones_own(tmp_path, form):
    dense, module = Own().eval(), Taught(form=form)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    data = Rows()
    data.val_dataloader = data.train_dataloader  # what is learned by heart
    fit(module, data, WandaPruning(0.5), RunReport(tmp_path / "run"), max_epochs=10)
    assert len(module.taught_logits) > 4
    with torch.no_grad():
        assert all(torch.equal(dense(x), logits) for x, logits in module.taught_logits)
    after = dict(module.named_parameters())
    assert all(not torch.equal(weight, after[name]) for name, weight in before.items())
    report = report_of(tmp_path / "run")
    assert report["val_loss"]["recovered"] < report["val_loss"]["pruned"]
    assert inspect_folder(tmp_path / "run/model").sparsity == 0.5
    if form != "full":
        assert report["val_loss"]["merged"] == pytest.approx(report["val_loss"]["recovered"], rel=1e-4)


def test_a_hook_that_forgets_the_teacher_is_reported(tmp_path):
    class Forgetful(Taught):
        def on_train_start(self):
            pass

    with pytest.raises(ConfigError, match=r"super\(\)\.on_train_start"):
        fit(Forgetful(), Rows(), WandaPruning(0.5), max_epochs=1)
