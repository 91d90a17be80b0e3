"""Studies that go on: what must be as it was, what may change, and what an interrupt leaves."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from filelock import FileLock
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset, random_split

from sparsefit.modules import ImageClassifierModule

CONFIG = {"num_channels": 1, "patch_size": 4, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
MODULE = "sparsefit.modules.ImageClassifierModule"


class Scaled(LightningDataModule):
    """Splits by chance, shuffles what it calibrates on, and scales its images where batches are transferred."""

    def setup(self, stage):
        random = torch.Generator().manual_seed(0)
        labels = torch.randint(4, (160,), generator=random)
        images = torch.randn(160, 1, 8, 8, generator=random) + labels[:, None, None, None]
        self.train, self.test = random_split(TensorDataset(100 * images, labels), [120, 40])

    def train_dataloader(self):
        return DataLoader(self.train, 20, shuffle=True)

    def calibration_dataloader(self):
        return DataLoader(self.train, 20, shuffle=True)

    def test_dataloader(self):
        return [DataLoader(self.test, 40)]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        assert images.abs().max() > 20  # once
        return images / 100, labels


class OwnSteps(ImageClassifierModule):
    """Knows how to classify, and has no step of its own to predict by."""

    predict_step = LightningModule.predict_step

    def __init__(self) -> None:
        super().__init__("convnext", {**CONFIG, "num_labels": 4, "image_size": 8}, learning_rate=0.01)


@pytest.fixture
def recipe(tmp_path):
    """Two tiny models, or one, on a part of the digits."""
    settings = {"model": "convnext", "config": CONFIG, "num_classes": 10, "learning_rate": 0.003}
    return {
        "study": {"folder": str(tmp_path / "study")},
        "models": {"net": {"class_path": MODULE, "init_args": settings}},
        "data": {
            "class_path": "sparsefit.data.DigitsDataModule",
            "init_args": {"train_source": "digits:train[:128]", "test_source": "digits:test[:100]"}
            | {"calibration_samples": 64},
        },
        "grid": {"scores": ["magnitude"], "granularities": ["layer"], "sparsities": [0.5]},
        "training": {"epochs": 1},
        "finetuning": {"epochs": 1, "learning_rate": 0.001},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }


def rows(folder, timed=True):
    with (folder / "results.csv").open(newline="") as lines:
        return [{name: v for name, v in row.items() if timed or "seconds" not in name} for row in csv.DictReader(lines)]


def files_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


REFUSED = {
    "--data.init_args.calibration_samples=32": "calibration_samples 64, and now it is 32",
    "--training.epochs=2": "training.epochs 1, and now it is 2",
    "--seed_everything=1": "seed_everything 0, and now it is 1",
    "--finetuning.learning_rate=0.1": "finetuning.learning_rate 0.001, and now it is 0.1",
    "--trainer.limit_train_batches=1": "trainer.limit_train_batches None, and now it is 1",
    "--grid.settings={exclude: [pwconv2]}": "grid.settings.exclude None, and now it is ['pwconv2']",
}


@pytest.mark.slow
def test_a_study_of_other_settings_is_refused(sparsefit, recipe, tmp_path):
    assert sparsefit("study", recipe=recipe)[0] == 0
    before = files_of(tmp_path / "study")
    for argument, words in REFUSED.items():
        status, _, errors = sparsefit("study", argument, recipe=recipe)
        assert status == 2, argument
        assert words in errors
        assert "another folder" in errors
    assert files_of(tmp_path / "study") == before
    harmless = ["--data.init_args.evaluation_batch_size=10", "--trainer.log_every_n_steps=3"]
    assert sparsefit("study", *harmless, recipe=recipe)[0] == 0
    assert rows(tmp_path / "study") == rows(tmp_path / "study")


def test_finetuning_may_come_later(sparsefit, recipe, tmp_path):
    assert sparsefit("study", "--finetuning.epochs=0", "--finetuning.learning_rate=null", recipe=recipe)[0] == 0
    assert sparsefit("study", recipe=recipe)[0] == 0
    assert [row["stage"] for row in rows(tmp_path / "study")] == ["dense", "pruned", "finetuned"]


@pytest.mark.slow
def test_a_model_that_comes_back_must_be_what_it_was(sparsefit, recipe):
    recipe["finetuning"] = {"epochs": 0}
    other = {"class_path": MODULE, "init_args": recipe["models"]["net"]["init_args"] | {"learning_rate": 0.1}}
    recipe["models"]["b"] = recipe["models"]["net"]
    assert sparsefit("study", recipe=recipe)[0] == 0
    del recipe["models"]["b"]
    assert sparsefit("study", recipe=recipe)[0] == 0
    status, _, errors = sparsefit("study", recipe=recipe | {"models": recipe["models"] | {"b": other}})
    assert status == 2
    assert "models.b.init_args.learning_rate 0.003, and now it is 0.1" in errors


def test_other_weights_under_the_same_name_are_noticed(sparsefit, recipe, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = ImageClassifierModule("convnext", CONFIG, num_classes=10)
        module.model.save_pretrained(tmp_path / f"model-{seed}")
    recipe["models"] = {"net": {"class_path": MODULE, "init_args": {"model": str(tmp_path / "model-0")}}}
    recipe |= {"training": {"epochs": 0}, "finetuning": {"epochs": 0}}
    assert sparsefit("study", recipe=recipe)[0] == 0
    before = rows(tmp_path / "study")
    (tmp_path / "model-1/model.safetensors").replace(tmp_path / "model-0/model.safetensors")
    status, _, errors = sparsefit("study", "--grid.sparsities=[0.5,0.6]", recipe=recipe)
    assert status == 2
    assert "models.net has other weights" in errors
    assert rows(tmp_path / "study") == before


def test_a_recipe_that_came_to_nothing_may_be_corrected(sparsefit, recipe, tmp_path):
    wrong = recipe["models"]["net"]["init_args"] | {"config": {**CONFIG, "hiden_sizes": [8, 16]}}
    status, _, errors = sparsefit(
        "study", recipe=recipe | {"models": {"net": {"class_path": MODULE, "init_args": wrong}}}
    )
    assert status == 2
    assert "hiden_sizes" in errors
    assert sparsefit("study", recipe=recipe)[0] == 0


@pytest.mark.slow
def test_data_and_a_module_of_ones_own_give_the_same_table_after_an_interrupt(sparsefit, recipe, tmp_path, monkeypatch):
    recipe["models"] = {"net": {"class_path": f"{__name__}.OwnSteps"}}
    recipe["data"] = {"class_path": f"{__name__}.Scaled"}
    recipe["grid"] = {"scores": ["wanda"], "granularities": ["layer"], "sparsities": [0.5, 0.8]}
    status, _, errors = sparsefit("study", recipe=recipe)
    assert status == 0, errors
    whole = rows(tmp_path / "study", timed=False)

    for moment in (4, 10, 14):  # in the dense training and two fine-tunings, of 6 steps each
        steps = []

        def stop(self, batch, batch_idx, moment=moment, steps=steps, step=ImageClassifierModule.training_step):
            steps.append(batch_idx)
            if len(steps) == moment:
                raise KeyboardInterrupt
            return step(self, batch, batch_idx)

        recipe["study"]["folder"] = str(tmp_path / f"stopped-{moment}")
        with monkeypatch.context() as patch:
            patch.setattr(OwnSteps, "training_step", stop, raising=False)
            assert sparsefit("study", recipe=recipe)[0] == 130
        about = json.loads((tmp_path / f"stopped-{moment}/study.json").read_text())
        assert (about["status"], about["planned"]) == ("interrupted", 5)
        assert sparsefit("study", recipe=recipe)[0] == 0
        assert rows(tmp_path / f"stopped-{moment}", timed=False) == whole


def test_two_studies_do_not_share_a_folder(sparsefit, recipe, tmp_path):
    (tmp_path / "study").mkdir()
    with FileLock(tmp_path / "study/.lock"):
        status, _, errors = sparsefit("study", recipe=recipe)
    assert status == 2
    assert "another study is running" in errors


def test_a_damaged_account_is_reported(sparsefit, recipe, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").write_text("{")
    status, _, errors = sparsefit("study", recipe=recipe)
    assert status == 2
    assert "study.json is damaged" in errors
