from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from small_runs import Classifier, fit, labelled, trainer_with
from torch import nn

from sparsefit.callbacks import RunReport, WandaPruning
from sparsefit.errors import DivergenceError

pytestmark = pytest.mark.figures


class Spoiled(Classifier):
    """Something goes wrong in one batch of its training."""

    def __init__(self, at: int, spoil: str, value: float = math.nan, **settings):
        super().__init__(**settings)
        self.at, self.spoil, self.value = at, spoil, value

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if self.spoil == "loss" and batch_idx == self.at else loss

    def on_after_backward(self):
        if self.spoil == "gradient" and self.trainer.fit_loop.batch_idx == self.at:
            self.model.head.bias.grad[0] = self.value


def saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"))


def all_finite(tensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fit_stops_before_the_step_and_names_the_checkpoint_before_it(tmp_path, spoil, value):
    module = Spoiled(at=3, spoil=spoil, value=value)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_on_exception=True)
    with pytest.raises(DivergenceError, match=rf"the {spoil} of optimizer step 4 is NaN.*epoch=0-step=3\.ckpt"):
        fit(module, labelled(32), WandaPruning(0.5), keep, max_epochs=1, enable_checkpointing=True)
    assert [path.stem for path in saved(tmp_path)] == ["epoch=0-step=1", "epoch=0-step=2", "epoch=0-step=3"]
    last = torch.load(saved(tmp_path)[-1], weights_only=True)["state_dict"]
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in last.items())


def test_batches_that_a_step_accumulates_count_together():
    module = Spoiled(at=2, spoil="loss")
    with pytest.raises(DivergenceError, match=r"the loss of optimizer step 1 is NaN.*no checkpoint had been written"):
        fit(module, labelled(32), WandaPruning(0.5), accumulate_grad_batches=4)
    assert len(module.seen) == 4
    assert all_finite(module.parameters())


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_step_that_breaks_the_weights_is_not_saved(tmp_path, weights_only):
    def wild(parameters):
        return torch.optim.SGD(parameters, lr=1e38)

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only)
    with pytest.raises(DivergenceError, match=r"NaN or infinite.*learning rate of 1e\+38"):
        fit(Classifier(wild), labelled(64), WandaPruning(0.5), keep, enable_checkpointing=True)
    assert all(all_finite(torch.load(path, weights_only=True)["state_dict"].values()) for path in saved(tmp_path))


def test_the_last_step_is_looked_at_and_the_report_says_why_it_ended(tmp_path):
    class Last(Classifier):
        def on_train_batch_end(self, *args):
            with torch.no_grad():
                self.model.blocks[0].up.bias[0] = math.inf

    run = tmp_path / "run"
    report = RunReport(str(run))
    with pytest.raises(DivergenceError, match=r"after 1 optimizer steps .*blocks\.0\.up\.bias \(1\)"):
        fit(Last(), labelled(4), report, WandaPruning(0.5), max_epochs=1, max_steps=1)
    assert report.report["status"] == "failed"
    assert "DivergenceError" in report.report["error"]
    assert not (run / "model").exists()
    assert (run / "base").is_dir()


def test_manual_optimization_is_looked_at_too():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss * (math.nan if batch_idx == 2 else 1))
            optimizer.step()

    module = Manual()
    with pytest.raises(DivergenceError, match="the loss of optimizer step 3"):
        fit(module, labelled(16), WandaPruning(0.5))
    assert all_finite(module.parameters())


def test_steps_that_a_gradient_scaler_leaves_out_are_no_error():
    class Scaler(torch.amp.GradScaler):
        skipped = 0

        def step(self, optimizer, *args, **kwargs):
            before = [p.clone() for group in optimizer.param_groups for p in group["params"]]
            result = super().step(optimizer, *args, **kwargs)
            after = [p for group in optimizer.param_groups for p in group["params"]]
            Scaler.skipped += all(map(torch.equal, before, after))
            return result

    scaler = Scaler(device="cpu", init_scale=2.0)
    module = Spoiled(at=1, spoil="gradient", value=math.inf)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(module, labelled(16), WandaPruning(0.5), plugins=[plugin], max_epochs=1)
    assert Scaler.skipped == 1
    assert all_finite(module.parameters())


class AlwaysInfinite(Classifier):
    """No scale makes its gradients finite."""

    def on_after_backward(self):
        self.model.head.bias.grad[0] = math.inf

    def validation_step(self, batch, batch_idx):
        pass


def scaled(scale):
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))]


LOOKS = {
    "every so many steps": (50, {}),
    "at the end of an epoch": (8, {"limit_train_batches": 8}),
    "before a validation": (9, {"val_check_interval": 9, "num_sanity_val_steps": 0}),
    "before a checkpoint": (10, {"enable_checkpointing": True}),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_run_of_which_a_gradient_scaler_leaves_out_every_step_is_stopped(tmp_path, look):
    step, settings = LOOKS[look]
    saving = [ModelCheckpoint(tmp_path, every_n_train_steps=10)] if "enable_checkpointing" in settings else []
    module, loaders = AlwaysInfinite(), {"train_dataloaders": labelled(240), "val_dataloaders": labelled(4)}
    trainer = trainer_with(WandaPruning(0.5), *saving, plugins=scaled(0.01), max_epochs=100, **settings)
    said = rf"left out all of {step} optimizer steps, .*weights stay as they were\..* Train with bf16-mixed or 32-true"
    with pytest.raises(DivergenceError, match=said):
        trainer.fit(module, **loaders)


@pytest.mark.slow
@pytest.mark.parametrize("report_first", [True, False])
def test_a_short_run_of_which_every_step_was_left_out_is_not_reported_as_trained(tmp_path, report_first):
    report = RunReport(str(tmp_path / "run"))
    callbacks = [report, WandaPruning(0.5)] if report_first else [WandaPruning(0.5), report]
    with pytest.raises(DivergenceError, match="left out all of 6 optimizer steps"):
        fit(AlwaysInfinite(), labelled(16), *callbacks, plugins=scaled(65536.0), max_steps=6)
    assert report.report["status"] == "failed"


def test_parameters_without_gradients_and_infinite_buffers_do_not_stop_a_fit():
    class Partly(Classifier):
        def __init__(self):
            super().__init__()
            self.model.unused = nn.Linear(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    module, pruning = Partly(), WandaPruning(0.5)
    trainer = fit(module, labelled(16), pruning, max_epochs=1)
    assert trainer.global_step == 4
    assert module.mask.tolist() == [0.0, -math.inf]
    pruning.masks.verify(module)
