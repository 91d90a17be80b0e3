"""`sparsefit plan`: its counts equal those of a run, and it reports what does not fit."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from ranks import forking
from tiny_models import make_tiny_model, save_llama
from torch.utils.data import DataLoader, IterableDataset
from transformers import ViTConfig, ViTForImageClassification

from sparsefit import PruningConfig, prune
from sparsefit.cli import miniature_run, plan
from sparsefit.cli.miniature_measures import SavedActivations
from sparsefit.cli.plan_reading import read_data
from sparsefit.cli.plan_recipe import _forwards, devices_of
from sparsefit.modules import CausalLMModule
from sparsefit.planning import Measured

pytestmark = pytest.mark.slow

BLOCKS = 5


@pytest.fixture
def deep(tmp_path, recipe):
    """The recipe with a model of more blocks than a miniature has."""
    model = save_llama(tmp_path / "deep", num_hidden_layers=BLOCKS)
    recipe["model"]["init_args"]["model"] = str(tmp_path / "deep")
    return recipe, model


@pytest.fixture
def forked_miniature(monkeypatch):
    """Forks the process of the miniature run from one that has imported the libraries."""
    monkeypatch.setattr(miniature_run, "get_context", lambda method: forking())


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, " ".join(text.split()))
    assert found, f"{pattern} is not in {text}"
    return float(found[1].replace(",", ""))


@pytest.mark.usefixtures("forked_miniature")
def test_a_plan_tells_what_the_run_then_takes(sparsefit, deep, tmp_path):
    recipe, model = deep
    recipe["reconstruction"] = {"passes": 1, "batch_size": 2}
    recipe["trainer"]["max_steps"] = 4
    status, reported, errors = sparsefit("plan", recipe=recipe)
    assert status == 0, errors
    run = Path(recipe["run"]["folder"])
    assert not run.exists()
    assert number(r"Plan: ([\d,]+) weights", reported) == pytest.approx(
        sum(p.numel() for p in model.parameters()), rel=0.02
    )
    blocks = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    assert number(r"weights, ([\d,]+) of them", reported) == blocks
    assert number(r"training: ([\d,]+) steps", reported) == 4
    assert "limited by max_steps" in reported
    for stage in ("evaluation", "calibration and pruning", "reconstruction", "training", "export"):
        assert re.search(rf"{stage}.*? s +[<\d.]+ +\d+%", reported), stage
    assert "DOES NOT FIT" not in reported
    assert sparsefit("fit", recipe=recipe)[0] == 0
    files = sum(file.stat().st_size for file in run.rglob("*") if file.is_file() and "logs" not in file.parts)
    unit = {"KiB": 2**10, "MiB": 2**20}[re.search(r"files: [\d.,]+ (\w+)", " ".join(reported.split()))[1]]
    assert number(r"files: ([\d.,]+)", reported) * unit == pytest.approx(files, rel=0.1)


@pytest.mark.usefixtures("forked_miniature")
def test_a_budget_that_buys_no_step_is_reported(sparsefit, recipe):
    recipe["budget"] = {"gpu_hours": 1e-5}
    status, reported, _ = sparsefit("plan", recipe=recipe)
    assert status == 0
    assert "NOTHING IS TRAINED" in reported
    assert "raise budget.gpu_hours" in reported


def test_a_gpu_by_its_data_sheet(sparsefit, deep):
    recipe, model = deep
    status, reported, errors = sparsefit("plan", "--gpu", "h100", recipe=recipe)
    assert status == 0, errors
    assert "nothing is measured" in reported
    assert number(r"Plan: ([\d,]+) weights", reported) == pytest.approx(
        sum(p.numel() for p in model.parameters()), rel=0.02
    )
    status, _, errors = sparsefit("plan", "--gpu", "abacus", recipe=recipe)
    assert status == 2
    assert "'abacus': use one of" in errors


def test_a_data_sheet_counts_the_passes_and_gradients_of_the_allocation(sparsefit, deep):
    recipe, _ = deep
    found = {}
    for allocation in ("uniform", "owl", "fisher"):
        recipe["pruning"] = {"sparsity": 0.5, "allocation": allocation}
        status, reported, errors = sparsefit("plan", "--gpu", "h100", "--trainer.max_steps", 0, recipe=recipe)
        assert status == 0, errors
        found[allocation] = number(r"arithmetic: ([\d.e+-]+) ", reported)
    assert found["owl"] / found["uniform"] == pytest.approx(3 / 2, rel=0.1)
    assert found["fisher"] / found["uniform"] == pytest.approx(6 / 2, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 2),
        ({"update": "none"}, 1),
        ({"update": "none", "swaps": 1}, 1),
        ({"score": "magnitude"}, 0),
        ({"existing_zeros": "adopt"}, 0),
        ({"allocation": "owl"}, 3),
        ({"allocation": "owl", "update": "none"}, 1),
        ({"allocation": "owl", "score": "magnitude"}, 1),
        ({"allocation": "fisher"}, 4 + 2),
        ({"allocation": "fisher", "update": "none"}, 2 + 2),
        ({"allocation": "fisher", "update": "none", "swaps": 1}, 3 + 2),
        ({"allocation": "fisher", "score": "magnitude"}, 2 + 2),
    ],
)
def test_the_passes_of_a_plan_are_those_of_the_pruning(settings, passes):
    config, model, samples = PruningConfig(**settings), make_tiny_model("llama"), 8
    if config.existing_zeros == "adopt":
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[:, 0] = 0
    seen = 0

    def count(module, args):
        nonlocal seen
        seen += len(args[0])

    # In any block but the first, which is computed once more when the calls of the blocks are recorded.
    model.model.layers[1].input_layernorm.register_forward_pre_hook(count)
    prune(model, [{"input_ids": torch.randint(3, 61, (samples, 12))}], config)
    backward = 2 * (config.allocation == "fisher")
    assert _forwards(config) == passes
    assert seen // samples + backward == passes  # single samples also trace the model


@pytest.mark.parametrize(("form", "steps", "evaluations"), [("lora", 3, 3), ("masked_lora", 3, 4), ("lora", 0, 2)])
def test_a_data_sheet_plans_the_evaluations_of_the_recipe(sparsefit, deep, form, steps, evaluations):
    recipe, _ = deep
    recipe["model"]["init_args"]["adapter"]["form"] = form
    status, reported, errors = sparsefit("plan", "--gpu", "h100", "--trainer.max_steps", steps, recipe=recipe)
    assert status == 0, errors
    assert re.search(rf"evaluation {evaluations} x \d+ batches", reported)
    assert ("training" in reported.partition("memory")[2].partition(")")[0]) == bool(steps)
    assert "not computed from a data sheet: files" in reported
    assert "0 B" not in reported


@pytest.mark.usefixtures("forked_miniature")
def test_what_fails_in_the_miniature_is_one_sentence(sparsefit, recipe):
    recipe["model"]["init_args"]["adapter"]["target_modules"] = ["no_such_layer"]
    status, _, errors = sparsefit("plan", recipe=recipe)
    assert status == 2
    assert "no_such_layer" in errors
    assert "Traceback" not in errors


@pytest.mark.usefixtures("forked_miniature")
def test_validations_are_planned_and_the_line_opens_the_fit(sparsefit, recipe, tmp_path, caplog):
    recipe["data"]["init_args"] |= {"val_source": str(tmp_path / "test"), "val_windows": 6}
    recipe["trainer"] |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 5}
    status, reported, errors = sparsefit("plan", recipe=recipe)
    assert status == 0, errors
    assert "validation 3 x 3 batches" in reported
    line = re.search(r"Plan: .* GPU-hours, at most 5 steps", reported)[0]
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    assert sparsefit("fit", recipe=recipe)[0] == 0
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Plan: ")]
    assert said == [line]


@pytest.mark.usefixtures("forked_miniature")
def test_a_recipe_that_is_only_pruned(sparsefit, recipe, caplog):
    status, reported, errors = sparsefit("plan", "--trainer.max_steps", "0", recipe=recipe)
    assert status == 0, errors
    assert not re.search(r"training \d|training:", reported)
    assert "calibration and pruning" in reported
    line = re.search(r"Plan: .* GPU-hours, at most 0 steps", reported)[0]
    assert "and 0 to train" in line
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    assert sparsefit("fit", "--trainer.max_steps", "0", recipe=recipe)[0] == 0
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Plan: ")]
    assert said == [line]


@pytest.mark.usefixtures("forked_miniature")
def test_what_does_not_fit_is_reported_with_the_setting_to_change(sparsefit, recipe, monkeypatch):
    monkeypatch.setattr(plan, "memory_of", lambda accelerator: 2**20)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**10))
    status, reported, errors = sparsefit("plan", recipe=recipe)
    assert status == 0, errors
    assert re.search(r"DOES NOT FIT: pruning takes .* of 1.00 MiB memory: set .*micro_batch_size", reported)
    assert re.search(r"DOES NOT FIT: training takes .*gradient_checkpointing", reported)
    assert re.search(r"DOES NOT FIT: the run folder takes .* has 1.00 KiB: set run.folder", reported)


@pytest.mark.parametrize(("free", "blocks"), [(2**40, BLOCKS), (2**10, 3)])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_second_miniature_has_the_blocks_that_fit(sparsefit, deep, monkeypatch, free, blocks, steps):
    measured, counts = [], {"all": 9.0, "pruned": 8.0, "train": 1.0}

    def measure(run, more):
        measured.append(run.blocks)
        one = Measured(run.blocks, run.samples, 2, {"pruning": 0.01}, {"pruning": 2.0**12}, {}, counts, 2.0**12)
        return [one, *([one] if more else [])]

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "free_host_memory", lambda: free)
    status, _, errors = sparsefit("plan", "--trainer.max_steps", steps, recipe=deep[0])
    assert status == 0, errors
    assert measured == [2, blocks]


def test_several_devices_are_reckoned_from_one(sparsefit, deep):
    recipe, _ = deep
    recipe["trainer"] |= {"devices": 4, "strategy": "ddp"}
    status, reported, errors = sparsefit("plan", "--gpu", "h100", recipe=recipe)
    assert status == 0, errors
    assert "on each of 4 devices" in reported
    assert "memory of each device" in reported
    assert "on the host" in reported
    assert "4 devices, each with all weights: computed from one" in reported
    recipe["trainer"]["strategy"] = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    recipe["trainer"]["num_nodes"] = 2
    split = sparsefit("plan", "--gpu", "h100", recipe=recipe)[1]
    assert "8 devices, each with its part of the weights" in split
    recipe["pruning"] = {"sparsity": 0.5, "allocation": "fisher"}  # which the run refuses on shards
    status, _, errors = sparsefit("plan", "--gpu", "h100", recipe=recipe)
    assert (status, "sharded over ranks: use allocation 'owl'" in errors) == (2, True), errors


def test_a_study_is_not_planned(sparsefit, recipe):
    status, _, errors = sparsefit("plan", recipe=recipe | {"study": {"folder": "runs/study"}, "grid": {}})
    assert status == 2
    assert "the recipe of a study" in errors


def test_a_model_that_is_to_write_its_text_first(sparsefit, recipe):
    kept = ("tokenizer", "sequence_length", "batch_size", "calibration_samples", "test_source")
    settings = {name: value for name, value in recipe["data"]["init_args"].items() if name in kept}
    recipe["data"] = {"class_path": "sparsefit.data.SelfGeneratedDataModule", "init_args": settings}
    status, _, errors = sparsefit("plan", recipe=recipe)
    assert status == 2
    assert "the model generates this recipe's text" in errors


@pytest.mark.parametrize("allocation", [None, "fisher"])
def test_a_miniature_counts_the_gradients_of_a_calibration_sample(allocation):
    saved, samples = [], 3

    def make(blocks):
        module = CausalLMModule(make_tiny_model("llama", num_hidden_layers=blocks))
        forward = module.model.forward

        def counting(*args, **kwargs):
            # One pass finds errors, and one of each sample takes gradients. The miniature then counts by itself.
            if not torch.is_grad_enabled() or len(saved) == 1 + samples:
                return forward(*args, **kwargs)
            with SavedActivations(module) as own:
                output = forward(*args, **kwargs)
            saved.append(own.bytes)
            return output

        module.model.forward = counting
        return module

    batch = {"input_ids": torch.randint(3, 61, (samples, 12))}
    pruning = {"sparsity": 0.5, "allocation": allocation}
    options = {"passes": 0}, {"accelerator": "cpu"}
    run = miniature_run.Miniature(make, 2, pruning, *options, [batch], samples, test=batch)
    found = miniature_run._measure(run)
    if allocation is None:
        assert "backward" not in found.tensors
        return
    assert len(saved) == 1 + samples
    assert set(saved) == {found.tensors["backward"] - found.counts["pruned"]}
    assert saved[0] > 0


def test_an_image_classifier_is_not_planned_by_a_data_sheet(sparsefit, recipe, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
    sizes |= {"num_channels": 1, "image_size": 32, "patch_size": 8}
    ViTForImageClassification(ViTConfig(num_labels=10, **sizes)).save_pretrained(tmp_path / "vit")
    arguments = {"model": str(tmp_path / "vit")}
    recipe["model"] = {"class_path": "sparsefit.modules.ImageClassifierModule", "init_args": arguments}
    settings = {"batch_size": 100, "calibration_samples": 32, "train_source": "digits:train[:1000]"}
    recipe["data"] = {"class_path": "sparsefit.data.DigitsDataModule", "init_args": settings}
    status, _, errors = sparsefit("plan", "--gpu", "h100", recipe=recipe)
    assert (status, "--gpu needs a language model" in errors) == (2, True), errors


class Without(LightningDataModule):
    """Data without test data."""

    def train_dataloader(self):
        return DataLoader(torch.zeros(4, 2))

    def calibration_dataloader(self):
        return DataLoader(torch.zeros(4, 2))


class Stream(IterableDataset):
    def __iter__(self):
        return itertools.repeat(torch.zeros(2))


class Streamed(Without):
    def test_dataloader(self):
        return DataLoader(Stream())


@pytest.mark.parametrize(("data", "has_test"), [(Without, False), (Streamed, True)])
def test_data_without_test_data_or_without_a_length_are_read(data, has_test):
    settings = Namespace(data=Namespace(class_path=f"{__name__}.{data.__name__}"), trainer=Namespace())
    settings.trainer.limit_train_batches = None
    settings.run = Namespace(tasks=None)
    read = read_data(settings, evaluates=True)
    assert (read.test is not None, read.test_batches, read.epoch_batches) == (has_test, 0, 4)


def test_a_model_without_blocks_to_count_is_measured_whole(sparsefit, recipe):  # in a new process, as for users
    sizes = {"num_channels": 1, "patch_size": 2, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
    arguments = {"model": "convnext", "config": sizes, "num_classes": 10}
    recipe["model"] = {"class_path": "sparsefit.modules.ImageClassifierModule", "init_args": arguments}
    settings = {"batch_size": 100, "calibration_samples": 32, "train_source": "digits:train[:1000]"}
    settings["val_source"] = "digits:train[1000:]"
    recipe["data"] = {"class_path": "sparsefit.data.DigitsDataModule", "init_args": settings}
    recipe["trainer"] |= {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3}
    status, reported, errors = sparsefit("plan", recipe=recipe)
    assert status == 0, errors
    assert "training 8 steps of 300 samples" in reported  # 10 batches of an epoch are 4 steps
    assert "limited by max_epochs" in reported
    assert re.search(r"validation 3 x \d+ batches", reported)
    assert "calibration and pruning 32 samples" in reported
    assert "tokens" not in reported


@pytest.mark.parametrize(
    ("devices", "on_gpu", "number"),
    [(3, True, 3), ("2", False, 2), ([0, 2], True, 2), ("0,1,5", True, 3), ("auto", False, 1), (-1, False, 1)],
)
def test_how_many_devices_a_trainer_takes(devices, on_gpu, number):
    assert devices_of({"devices": devices}, on_gpu) == number
