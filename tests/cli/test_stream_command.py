"""`sparsefit prune --stream` gives what `sparsefit prune` gives, or says why not before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsefit.cli import streaming
from sparsefit.pruning import MaskSet
from sparsefit.recovery.run_files import CLAIMED, RunState


def weights_in(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def both(sparsefit, recipe, tmp_path):
    """The folders of a recipe pruned in memory and streamed."""

    def run(**pruning):
        recipe["pruning"] |= pruning
        folders = tmp_path / "memory", tmp_path / "stream"
        for folder, options in zip(folders, ((), ("--stream",)), strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            recipe["run"]["folder"] = str(folder)
            status, _, errors = sparsefit("prune", *options, recipe=recipe)
            assert status == 0, errors
        return folders

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "pruning",
    [
        {"sparsity": 0.6, "calibration_samples": 5},
        {"sparsity": None, "pattern": "2:4", "reconstruction": "sequential"},
        {"score": "magnitude"},
    ],
)
def test_masks_weights_and_settings_are_those_of_the_model_in_memory(both, pruning):
    memory, stream = both(**pruning)
    assert (memory / "masks.safetensors").read_bytes() == (stream / "masks.safetensors").read_bytes()
    here, there = weights_in(memory / "base"), weights_in(stream / "base")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (memory / "base" / name).read_bytes() == (stream / "base" / name).read_bytes()
    MaskSet.load(stream / "masks.safetensors").verify(AutoModelForCausalLM.from_pretrained(stream / "base"))


@pytest.mark.slow
def test_the_report_says_how_the_model_was_pruned(both):
    memory, stream = (json.loads((folder / "report.json").read_text()) for folder in both(swaps=2))
    assert stream["status"] == "finished"
    assert stream["streamed"] is True
    differ = {"seconds", "peak_memory_bytes"}
    assert {key for key, value in memory["pruning"].items() if stream["pruning"][key] != value} <= differ
    assert {key for key, value in memory["sparsity"].items() if stream["sparsity"][key] != value} == {"counted_on"}
    assert stream["seconds"]["total"] >= sum(stream["seconds"]["stages"].values())


@pytest.mark.slow
def test_other_commands_take_the_folder(both, sparsefit, tmp_path):
    _, run = both()
    status, output, _ = sparsefit("inspect", run)
    assert (status, "All 14 masks hold" in output) == (0, True)
    status, output, errors = sparsefit("evaluate", run, "--perplexity", tmp_path / "test", "--length", 16)
    assert (status, "perplexity: " in output) == (0, True), errors
    status, output, _ = sparsefit("fit", "--resume", run)
    assert (status, "nothing is left to do" in output) == (0, True)
    status, _, errors = sparsefit("prune", "--stream", "--config", run / "config.yaml")
    assert (status, "exists and is not empty" in errors) == (2, True)
    status, _, errors = sparsefit("prune", "--stream", "--config", run / "config.yaml", "--run.folder", tmp_path / "2")
    assert status == 0, errors
    assert (run / "masks.safetensors").read_bytes() == (tmp_path / "2/masks.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ends", [KeyboardInterrupt, MemoryError])
def test_what_is_broken_off_leaves_no_half_model(sparsefit, recipe, tmp_path, monkeypatch, ends):
    begun = []

    def broken_off(model, batches, config, *, progress, **settings):
        def stop(done, total):
            begun.append(list((tmp_path / "run").glob("base*/*.safetensors")))
            if done > 2:
                raise ends("enough")

        return prune(model, batches, config, progress=stop, **settings)

    prune = streaming.prune
    monkeypatch.setattr(streaming, "prune", broken_off)
    if ends is KeyboardInterrupt:
        assert sparsefit("prune", "--stream", recipe=recipe)[0] == 130
    else:
        with pytest.raises(MemoryError):
            sparsefit("prune", "--stream", recipe=recipe)
    assert len(begun[-1]) == 3  # there was something to leave
    assert not [file for file in (tmp_path / "run").rglob("*.safetensors*")]
    assert yaml.safe_load((tmp_path / "run/state.json").read_text())["name"] == "failed"
    monkeypatch.undo()
    assert sparsefit("prune", "--stream", recipe=recipe)[0] == 0


def test_what_a_killed_run_left_makes_room_for_the_next(sparsefit, recipe, tmp_path):
    left = tmp_path / "run/base.partial"
    left.mkdir(parents=True)
    (left / "model-00001-of-00003.safetensors").write_bytes(b"half")
    RunState(CLAIMED, "killed").write(tmp_path / "run")
    status, _, errors = sparsefit("prune", "--stream", recipe=recipe)
    assert status == 0, errors
    assert not left.exists()


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        (["--reconstruction.passes=1"], "does not reconstruct blocks"),
        (["--trainer.precision=bf16-mixed"], "set model.init_args.dtype"),
        (["--model.init_args.model=tiny-llama"], "no local folder"),
        (["--pruning.calibration_samples=100"], "gives 6 calibration samples; 100 were asked for"),
        (["--pruning.targets=[nothing]"], "no prunable layer is named 'nothing'"),
        (["--resume=elsewhere"], "cannot resume a run"),
    ],
)
def test_what_cannot_be_streamed_is_reported(sparsefit, recipe, tmp_path, options, reported):
    status, _, errors = sparsefit("prune", "--stream", *options, recipe=recipe)
    assert (status, reported in errors) == (2, True), errors
    assert not list(tmp_path.glob("run/base*"))


def test_gradients_are_refused_before_the_model_is_copied(sparsefit, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "stream_causal_lm", None)
    status, _, errors = sparsefit("prune", "--stream", "--pruning.allocation=fisher", recipe=recipe)
    assert (status, "read from memory-mapped files: use allocation 'owl'" in errors) == (2, True), errors
    assert not (tmp_path / "run").exists()


def test_only_prune_streams(sparsefit, recipe):
    status, _, errors = sparsefit("fit", "--stream", recipe=recipe)
    assert (status, "no setting stream" in errors) == (2, True), errors
