from __future__ import annotations

import json
import math
import shutil
import signal
from collections import namedtuple

import peft
import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from small_runs import Classifier, LanguageModel, fit, labelled, text
from transformers import AutoModelForCausalLM

from sparsefit.callbacks import GPUHourBudget, PrunedRunCallback, RunReport, WandaPruning
from sparsefit.errors import BudgetError, CalibrationError, RunFolderError
from sparsefit.evaluation.perplexity import perplexity
from sparsefit.pruning import MaskSet
from sparsefit.recovery.run_files import RunState

pytestmark = pytest.mark.figures


class Measured(LanguageModel):
    def __init__(self, model):
        super().__init__(model)
        self.metrics = {"perplexity": "lower"}

    def evaluate(self, batches, progress):
        return {"perplexity": perplexity(self.model, batches, progress)}


class TextData(LightningDataModule):
    def train_dataloader(self):
        return text(8)

    def test_dataloader(self):
        return text(4, seed=1)


class Break(PrunedRunCallback):
    """Breaks a run off, in calibration (step 0) or after a training step."""

    def __init__(self, error: BaseException, step: int) -> None:
        self.error, self.step = error, step

    def on_pruning_start(self, trainer, module):
        if self.step == 0:
            module.model.get_input_embeddings().register_forward_hook(self.break_off)

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise self.error

    def break_off(self, *args):
        if torch.is_grad_enabled() is False and self.armed():
            raise self.error

    def armed(self):
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls > 3  # two batches of the evaluation, and one of calibration


@pytest.fixture(autouse=True)
def interrupts():
    handler = signal.getsignal(signal.SIGINT)  # Lightning switches it off after a KeyboardInterrupt
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def measured(tiny_model):
    def make(lora=True):
        model = tiny_model("llama")
        if lora:
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
        return Measured(model)

    return make


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=next(iter(text(4, seed=2)))["input_ids"]).logits


def reloaded(folder):
    if (folder / "adapter").exists():
        config = json.loads((folder / "adapter/adapter_config.json").read_text())
        base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
        return peft.PeftModel.from_pretrained(base, folder / "adapter")
    return AutoModelForCausalLM.from_pretrained(folder / ("model" if (folder / "model").exists() else "base"))


def zeros_of_files(folder, part="base"):
    tensors, masks = load_file(folder / part / "model.safetensors"), MaskSet.load(folder / "masks.safetensors")
    masks.verify(tensors)
    return sum(int((tensors[name] == 0).sum()) for name in masks), sum(tensors[name].numel() for name in masks)


# What a run leaves.


@pytest.mark.slow
@pytest.mark.parametrize("report_first", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_the_folder_of_a_run(tmp_path, measured, lora, report_first):
    module, folder = measured(lora), tmp_path / "runs" / "first"
    report, pruning = RunReport(folder), WandaPruning()
    callbacks = [report, pruning] if report_first else [pruning, report]
    dense = perplexity(module.model, text(4, seed=1))
    fit(module, TextData(), *callbacks, log_every_n_steps=2)

    model = reloaded(folder)
    assert torch.equal(logits(model), logits(module.model))
    found = report_of(folder)
    assert found["status"] == "finished"
    assert found["name"] == "first"
    figures = found["perplexity"]
    assert figures["dense"] == pytest.approx(dense, rel=1e-5)
    assert figures["recovered"] == pytest.approx(perplexity(model, text(4, seed=1)), rel=1e-5)
    assert len(set(figures.values())) == 3
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert figures["pruned"] == pytest.approx(perplexity(base, text(4, seed=1)), rel=1e-5)
    assert found["merge"]["lossless"] is False if lora else "merge" not in found
    part = "base" if lora else "model"
    zeros, weights = zeros_of_files(folder, part)
    assert (found["sparsity"]["zeros"], found["sparsity"]["weights"]) == (zeros, weights)
    assert found["sparsity"]["total"] == zeros / weights == 0.5
    assert found["sparsity"]["counted_on"] == f"{part}/model.safetensors"
    assert len(found["sparsity"]["layers"]) == 21
    assert found["pruning"]["digest"] == pruning.masks.digest()
    assert found["training"]["steps"] == 8
    assert [entry["step"] for entry in found["training"]["history"]] == [1, 2, 4, 6, 8]
    assert found["training"]["history"][0]["loss"] > 0
    assert found["gpu_hours"]["total"] == pytest.approx(sum(found["gpu_hours"]["stages"].values()), rel=1e-2)
    assert {"calibration and pruning", "evaluation", "export"} <= set(found["gpu_hours"]["stages"])
    page = (folder / "report.html").read_text()
    assert "<html" in page
    assert "first" in page


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_pruning_alone(tmp_path, measured, lora):
    module = measured(lora)
    fit(module, TextData(), RunReport(tmp_path / "run"), WandaPruning(pattern="2:4"), max_steps=0)
    found = report_of(tmp_path / "run")
    assert found["status"] == "finished"
    assert set(found["perplexity"]) == {"dense", "pruned"}
    assert found["sparsity"]["pattern"] == "2:4"
    assert found["training"]["steps"] == 0
    assert not (tmp_path / "run/adapter").exists()
    assert torch.equal(logits(reloaded(tmp_path / "run")), logits(module.model))


def test_a_plain_torch_module(tmp_path):
    module = Classifier()
    module.evaluate = lambda batches, progress: pytest.fail("there are no test data")
    fit(module, labelled(), RunReport(tmp_path / "run"), WandaPruning())
    tensors = load_file(tmp_path / "run/model/model.safetensors")
    again = Classifier(seed=1)
    again.load_state_dict(tensors)
    x = torch.randn(5, 6)
    assert torch.equal(again(x), module(x))
    assert report_of(tmp_path / "run")["sparsity"]["total"] == 0.5
    assert zeros_of_files(tmp_path / "run") == (256, 512)


def test_a_base_that_is_trained_with_its_adapters_is_saved_as_it_ends(tmp_path, measured):
    module = measured()
    for name, parameter in module.model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    fit(module, TextData(), RunReport(tmp_path / "run"), WandaPruning())
    assert torch.equal(logits(reloaded(tmp_path / "run")), logits(module.model))
    assert zeros_of_files(tmp_path / "run") == zeros_of_files(tmp_path / "run", "trained_base")


def test_a_resumed_run_continues_with_its_report(tmp_path, measured):
    folder = tmp_path / "run"
    trainer = fit(measured(), TextData(), RunReport(folder), WandaPruning(), max_epochs=1, log_every_n_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    first, base = report_of(folder), (folder / "base/model.safetensors").read_bytes()
    module = measured()
    fit(module, TextData(), RunReport(folder), WandaPruning(), log_every_n_steps=1, ckpt_path=tmp_path / "a.ckpt")
    found = report_of(folder)
    assert {stage: found["perplexity"][stage] for stage in ("dense", "pruned")} == {
        stage: first["perplexity"][stage] for stage in ("dense", "pruned")
    }
    assert found["perplexity"]["recovered"] != first["perplexity"]["recovered"]
    assert [entry["step"] for entry in found["training"]["history"]] == list(range(1, 9))
    assert found["training"]["history"][:4] == first["training"]["history"]
    assert found["sparsity"] == first["sparsity"]
    assert found["pruning"] == first["pruning"]
    assert (folder / "base/model.safetensors").read_bytes() == base
    assert torch.equal(logits(reloaded(folder)), logits(module.model))


def test_a_run_resumed_in_another_folder_is_whole(tmp_path, measured):
    trainer = fit(measured(), TextData(), RunReport(tmp_path / "a"), WandaPruning(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = measured()
    fit(module, TextData(), RunReport(tmp_path / "b"), WandaPruning(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(logits(reloaded(tmp_path / "b")), logits(module.model))
    assert report_of(tmp_path / "b")["sparsity"]["total"] == 0.5


def test_a_checkpoint_cannot_continue_in_the_folder_of_another_run(tmp_path, measured):
    trainer = fit(measured(), TextData(), RunReport(tmp_path / "a"), WandaPruning(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(measured(), TextData(), RunReport(tmp_path / "b"), WandaPruning(pattern="2:4"), max_steps=0)
    before = {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="holds another run"):
        fit(measured(), TextData(), RunReport(tmp_path / "b"), WandaPruning(), ckpt_path=tmp_path / "a.ckpt")
    assert {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()} == before


# Folders that cannot be used.


def used(path, monkeypatch):
    path.mkdir()
    (path / "thesis.txt").write_text("the only copy")


def file_in_its_place(path, monkeypatch):
    path.write_text("the only copy")


def file_above(path, monkeypatch):
    path.parent.mkdir()
    path.parent.rmdir()
    path.parent.write_text("the only copy")


def full_disk(path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))


@pytest.mark.parametrize("report_first", [True, False])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (used, "exists and is not empty"),
        (file_in_its_place, "is a file"),
        (file_above, "cannot be written to"),
        (full_disk, "1000 B free; .* need about 35.16 KiB"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_anything(tmp_path, monkeypatch, spoil, message, report_first):
    folder = tmp_path / "above" / "run" if spoil is file_above else tmp_path / "run"
    spoil(folder, monkeypatch)
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    module, report, pruning = Classifier(), RunReport(folder), WandaPruning()
    with pytest.raises(RunFolderError, match=message):
        fit(module, labelled(), *([report, pruning] if report_first else [pruning, report]))
    assert pruning.masks is None
    assert (module.model.blocks[0].up.weight != 0).all()
    after = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*") if path != folder}
    assert {path: text for path, text in before.items() if path != folder} == after
    assert not list(folder.glob("report*"))


@pytest.mark.parametrize("left", ["config.yaml", ".config.yaml.0123.partial", "state.json"])
def test_the_folder_of_a_run_that_was_killed_before_it_had_a_base_is_free(tmp_path, left):
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run" / left).write_text("of the killed run")
    if left == "state.json":
        RunState("claimed").write(tmp_path / "run")
    fit(Classifier(), labelled(), RunReport(tmp_path / "run"), WandaPruning())
    assert not list((tmp_path / "run").glob(".*.partial"))
    assert (tmp_path / "run/base/model.safetensors").exists()


# Runs that break off.


@pytest.mark.slow
@pytest.mark.parametrize("with_budget", [True, False])
@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(KeyboardInterrupt(), SystemExit, "interrupted"), (RuntimeError("boom"), RuntimeError, "failed")],
)
@pytest.mark.parametrize("step", [0, 3])
def test_a_run_that_breaks_off(tmp_path, measured, error, raised, status, step, with_budget):
    module, pruning = measured(), WandaPruning(micro_batch_size=2)
    budget = [GPUHourBudget(gpu_hours=1.0)] if with_budget else []
    dense = {name: value.clone() for name, value in module.model.state_dict().items()}
    with pytest.raises(raised):
        fit(module, TextData(), *budget, RunReport(tmp_path / "run"), pruning, Break(error, step))
    found = report_of(tmp_path / "run")
    assert found["status"] == status
    assert type(error).__name__ in found["error"]
    assert math.isfinite(found["perplexity"]["dense"])
    assert (tmp_path / "run/report.html").exists()
    if step == 0:
        assert pruning.masks is None
        assert all(torch.equal(value, dense[name]) for name, value in module.model.state_dict().items())
        assert set(found["perplexity"]) == {"dense"}
        assert not (tmp_path / "run/base").exists()
    else:
        assert found["training"]["steps"] == 3
        assert zeros_of_files(tmp_path / "run")[0] > 0
        assert torch.equal(logits(reloaded(tmp_path / "run")), logits(module.model))


def test_a_budget_that_cannot_pay_for_calibration(tmp_path, measured):
    module = measured()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(BudgetError, match="cannot pay for calibration"):
        fit(module, TextData(), GPUHourBudget(1e-6), RunReport(tmp_path / "run"), WandaPruning())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    found = report_of(tmp_path / "run")
    assert found["status"] == "failed"
    assert found["gpu_hours"]["budget"] == 1e-6
    assert found["gpu_hours"]["total"] > 1e-6


def test_data_that_cannot_serve_are_reported(tmp_path):
    with pytest.raises(CalibrationError):
        fit(Classifier(), labelled(), RunReport(tmp_path / "run"), WandaPruning(calibration=[]))
    assert report_of(tmp_path / "run")["error"].startswith("CalibrationError: the calibration argument gives 0")
