"""`sparsefit fit` and `prune` on text that the model writes itself."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture
def own(recipe):
    """The recipe without a source of text."""
    settings = recipe["data"]["init_args"]
    recipe["data"] = {
        "class_path": "sparsefit.data.SelfGeneratedDataModule",
        "init_args": {name: settings[name] for name in ("tokenizer", "sequence_length", "batch_size")}
        | {"calibration_samples": 6, "train_tokens": 200, "writing_batch_size": 4},
    }
    recipe["model"]["init_args"]["adapter"]["form"] = "masked_lora"
    recipe["model"]["init_args"]["distill"] = {"weight": 1.0}
    return recipe


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def texts(folder):
    return {file.name: file.read_bytes() for file in (folder / "written_text").glob("*.npy")}


def test_no_data_set_is_needed_at_all(sparsefit, own, tmp_path):
    status, output, errors = sparsefit("fit", recipe=own)
    assert status == 0, errors
    report = report_of(tmp_path / "run")
    assert report["status"] == "finished"
    assert report["training"]["steps"] == 3
    assert report["sparsity"]["total"] == pytest.approx(0.5, abs=0.02)
    assert 0 < report["gpu_hours"]["stages"]["writing text"] < report["gpu_hours"]["total"]
    assert "writing text" in output
    assert "writing text" in (tmp_path / "run/report.html").read_text()
    assert report["merge"]["lossless"]
    assert "perplexity" not in report
    assert len(texts(tmp_path / "run")) == 2


def test_real_text_is_what_it_is_measured_on(sparsefit, own, tmp_path):
    own["data"]["init_args"]["test_source"] = str(tmp_path / "test")
    status, _, errors = sparsefit("prune", recipe=own)
    assert status == 0, errors
    assert report_of(tmp_path / "run")["perplexity"].keys() == {"dense", "pruned"}
    assert [name.partition("-")[0] for name in texts(tmp_path / "run")] == ["calibration"]


def test_a_run_takes_the_place_of_one_that_broke_off_as_its_model_wrote(sparsefit, own, tmp_path, monkeypatch):
    generate, calls = LlamaForCausalLM.generate, []

    def counted(self, *args, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *args, **settings)

    monkeypatch.setattr(LlamaForCausalLM, "generate", counted)
    assert sparsefit("fit", recipe=own)[0] != 0
    assert report_of(tmp_path / "run")["status"] == "interrupted"
    status, _, errors = sparsefit("fit", recipe=own)
    assert status == 0, errors
    assert len(calls) == 3 + 4  # of 2 batches of calibration and 4 of training, 2 were kept
    assert report_of(tmp_path / "run")["status"] == "finished"


def test_a_run_is_resumed_from_its_text(sparsefit, own, tmp_path, monkeypatch):
    saver = {"dirpath": str(tmp_path / "run/checkpoints"), "save_last": True, "every_n_train_steps": 2}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver}
    own["trainer"]["callbacks"] = [callback]
    own["budget"]["drive_learning_rate"] = False
    assert sparsefit("fit", recipe=own)[0] == 0
    adapter = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(LlamaForCausalLM, "generate", None)
    own["trainer"]["max_steps"] = 3
    steps = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert steps == 2
    status, _, errors = sparsefit("fit", f"--ckpt_path={tmp_path}/run/checkpoints/last.ckpt", recipe=own)
    assert status == 0, errors
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == adapter


def test_settings_are_checked(sparsefit, own):
    own["data"]["init_args"]["temperature"] = -1.0
    status, _, errors = sparsefit("fit", recipe=own)
    assert status == 2
    assert "temperature is -1.0: it must be a number above 0" in errors
