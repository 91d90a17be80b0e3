from __future__ import annotations

import shutil
import signal
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from resumed_runs import (
    DrawsInValidation,
    Stop,
    assert_same,
    callbacks,
    data,
    every_step,
    fit,
    module,
    text_file,
    weights,
)

from sparsefit.callbacks import WandaPruning
from sparsefit.callbacks.checkpoint_io import AtomicCheckpointIO
from sparsefit.errors import MaskError, RunFolderError
from sparsefit.modules import CausalLMModule
from sparsefit.pruning import MaskSet

STEPS = 12
EPOCH = 7  # batches


class SaveEachBatch(Callback):
    """Saves by itself."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx + 1}.ckpt")


@pytest.fixture(autouse=True)
def interruptible():
    """Lightning switches interrupts off after one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs that are never interrupted, by their settings: (folder, weights); each is run once."""
    runs = {}

    def run(workers=0, cls=CausalLMModule, val_source=False, saved=None, **settings):
        key = repr((workers, cls, val_source, saved, settings))
        if key not in runs:
            folder = tmp_path_factory.mktemp("straight")
            trained = module(cls)
            read = data(folder, num_workers=workers, val_source=text_file(folder) if val_source else None)
            saver = every_step(folder / "run/checkpoints", **(saved or {}))
            fit(trained, read, *callbacks(folder / "run"), saver, **({"max_steps": STEPS} | settings))
            runs[key] = folder, weights(trained)
        return runs[key]

    return run


def resume(folder, path, cls=CausalLMModule, workers=0, val_source=False, more=(), **settings):
    trained = module(cls)
    read = data(folder, num_workers=workers, val_source=text_file(folder) if val_source else None)
    fit(trained, read, *callbacks(folder / "run"), *more, ckpt_path=path, **({"max_steps": STEPS} | settings))
    return weights(trained)


VALIDATING = {"cls": DrawsInValidation, "val_source": True, "val_check_interval": 3, "limit_val_batches": 1}
AT_EPOCH_ENDS = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
RUNS = {
    "within an epoch": ({}, 3),
    "after the last batch of an epoch": ({}, EPOCH),
    "within the second epoch": ({}, EPOCH + 2),
    "at the end of an epoch": ({"saved": AT_EPOCH_ENDS}, EPOCH),
    "accumulating": ({"accumulate_grad_batches": 3, "max_steps": 5}, 2),
    "accumulating, after the last batch of an epoch": ({"accumulate_grad_batches": 3, "max_steps": 5}, 3),
    "with workers": ({"workers": 2, "max_steps": 4}, 2),
    "before a validation": (VALIDATING, 3),
    "after a validation": (VALIDATING, 4),
    "short epochs": ({"limit_train_batches": 5}, 5),
    "second short epoch": ({"limit_train_batches": 5}, 7),
    "short epochs, at the end of one": ({"limit_train_batches": 5, "saved": AT_EPOCH_ENDS}, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_with_the_same_weights(straight, name):
    settings, step = RUNS[name]
    folder, expected = straight(**settings)
    resumed = {key: value for key, value in settings.items() if key != "saved"}
    assert_same(resume(folder, folder / f"run/checkpoints/step={step}.ckpt", **resumed), expected)


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [2, 3])  # 5 and 8 are amid either
def test_a_checkpoint_amid_the_batches_of_a_step_goes_back_to_its_start(straight, tmp_path, accumulated):
    settings = {"accumulate_grad_batches": accumulated, "max_steps": 5}
    _, expected = straight(**settings)
    fit(module(), data(tmp_path), SaveEachBatch(tmp_path), *callbacks(tmp_path / "run"), **settings)
    for batch in (5, EPOCH + 1):
        assert_same(resume(tmp_path, tmp_path / f"{batch}.ckpt", **settings), expected)


INTERRUPTS = {
    "before a batch": ("on_train_batch_start", 3, {}),
    "before the first batch of an epoch": ("on_train_batch_start", EPOCH + 1, {}),
    "after the forward pass": ("on_before_backward", 3, {}),
    "after the backward pass": ("on_after_backward", 3, {}),
    "amid the batches of a step": ("on_after_backward", 5, {"accumulate_grad_batches": 3, "max_steps": 5}),
    "in the last batch of an epoch": ("on_after_backward", EPOCH, {}),
    "after the last batch of an epoch": ("on_train_batch_end", EPOCH, {}),
    "after a batch": ("on_train_batch_end", 3, {}),
    "after the first epoch": ("on_train_epoch_end", 1, {}),
    "before the second epoch": ("on_train_epoch_start", 2, {}),
    "in a validation": ("on_validation_batch_end", 3, VALIDATING),
    "in a validation amid a step": (
        "on_validation_batch_end",
        2,
        VALIDATING | {"accumulate_grad_batches": 2, "max_steps": 5},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERRUPTS)
def test_a_run_continues_after_an_interrupt_as_if_there_had_been_none(straight, tmp_path, name):
    hook, number, settings = INTERRUPTS[name]
    _, expected = straight(**settings)
    fitting = {key: value for key, value in settings.items() if key not in ("cls", "val_source")}
    read = data(tmp_path, val_source=text_file(tmp_path) if settings.get("val_source") else None)
    saver = every_step(tmp_path, every_n_epochs=1000, save_on_exception=True)
    with pytest.raises(SystemExit):
        fit(
            module(settings.get("cls", CausalLMModule)), read, *callbacks(tmp_path / "run"), Stop(hook, number), saver,
            **({"max_steps": STEPS} | fitting),
        )  # fmt: skip
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert_same(resume(tmp_path, checkpoint, **settings), expected)


def test_partly_changed_weights_are_reported(straight, tmp_path):
    saver = every_step(tmp_path, every_n_epochs=1000, save_on_exception=True)
    stop = Stop("on_before_optimizer_step", 3)
    with pytest.raises(SystemExit):
        fit(module(), data(straight()[0]), *callbacks(tmp_path / "run"), stop, saver, max_steps=STEPS)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["sparsefit"]
    assert (checkpoint["whole_step"], checkpoint["between_epochs"]) == (False, False)


@pytest.mark.slow
def test_a_checkpoint_saved_after_the_end_resumes_within_the_epoch(tmp_path):
    """The command's two ModelCheckpoints write last.ckpt anew when training has ended."""

    def saves(folder):
        common = {"dirpath": folder / "checkpoints", "save_last": True, "enable_version_counter": False}
        timed = {"filename": "timed-{step}", "train_time_interval": timedelta(minutes=15)}
        return ModelCheckpoint(**common, save_on_exception=True), ModelCheckpoint(**common, **timed)

    def without_budget(folder):  # which would let the learning rate end with the shorter run
        return callbacks(folder)[:3]

    runs = [tmp_path / name / "run" for name in ("whole", "extended")]
    whole, first, extended = module(), module(), module()
    fit(whole, data(tmp_path), *without_budget(runs[0]), *saves(runs[0]), max_steps=4)
    fit(first, data(tmp_path), *without_budget(runs[1]), *saves(runs[1]), max_steps=2)
    last = runs[1] / "checkpoints/last.ckpt"
    fit(extended, data(tmp_path), *without_budget(runs[1]), *saves(runs[1]), ckpt_path=last, max_steps=4)
    assert_same(weights(extended), weights(whole))


def test_a_checkpoint_is_not_resumed_in_the_folder_of_another_run(straight, tmp_path):
    folder, _ = straight()
    fit(module(), data(tmp_path), *callbacks(tmp_path / "run"), every_step(tmp_path), max_steps=1)
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="another run"):
        resume(folder, tmp_path / "step=1.ckpt")
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


# What is in it.


def test_a_checkpoint_holds_only_what_changes(straight):
    folder, whole = straight()
    checkpoint = torch.load(folder / "run/checkpoints/step=3.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {name for name in whole if "lora_" in name}
    assert checkpoint["callbacks"]["WandaPruning"].keys() == {"digest", "summary"}
    assert checkpoint["callbacks"]["GPUHourBudget"]["ledger"]["hours"]
    assert checkpoint["sparsefit"]["world_size"] == 1
    assert not list((folder / "run/checkpoints").glob(".*.partial"))


def test_what_differs_from_the_base_stays_in_the_checkpoint(straight, tmp_path):
    changed = "model.base_model.model.model.norm.weight"
    folder, _ = straight()
    trained = module()
    trainer = fit(trained, data(folder), *callbacks(tmp_path / "run"), max_steps=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    with torch.no_grad():
        trained.get_parameter(changed)[3] += 1  # frozen, and yet
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    shutil.rmtree(tmp_path / "run/base")
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    held = {path.stem: torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.glob("*.ckpt")}
    assert held["second"].keys() - held["first"].keys() == {changed}
    assert_same(held["whole"], weights(trained))


def test_nothing_is_left_out_without_a_base_and_plain_checkpoints_are_as_ever(straight, tmp_path):
    folder, expected = straight()
    fit(module(), data(folder), *callbacks(tmp_path / "run")[2:], every_step(tmp_path), max_steps=STEPS)
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == expected.keys()
    assert MaskSet.from_state_dict(checkpoint["callbacks"]["WandaPruning"]["masks"]).sparsity == 0.5
    again = module()
    fit(again, data(folder), *callbacks(tmp_path / "run")[2:], ckpt_path=tmp_path / "step=3.ckpt", max_steps=4)
    assert "sparsefit" not in checkpoint
    # The callback can resume from one of them, too.
    resume(folder, tmp_path / "step=3.ckpt", max_steps=4)


# Elsewhere.


def test_a_run_folder_may_be_moved_as_a_whole(straight, tmp_path):
    folder, expected = straight()
    shutil.copytree(folder / "run", tmp_path / "moved")
    path = tmp_path / "moved/checkpoints/step=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["sparsefit"]["base"]["folder"] = str(tmp_path / "nowhere")
    torch.save(checkpoint, path)
    trained = module()
    fit(trained, data(folder), *callbacks(tmp_path / "new"), ckpt_path=path, max_steps=STEPS)
    assert_same(weights(trained), expected)


def test_a_sparse_checkpoint_without_the_callback(straight):
    folder, _ = straight()
    state = torch.load(folder / "run/checkpoints/step=3.ckpt", weights_only=True)["callbacks"]["WandaPruning"]
    with pytest.raises(MaskError, match="resume with the callback SparseCheckpoints"):
        WandaPruning().load_state_dict(state)


# Writing.


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    writer, path = AtomicCheckpointIO(), tmp_path / "new/a.ckpt"
    writer.save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFolderError, match=r"cannot be written: .*No space left on device.*are unchanged\. Free"):
        writer.save_checkpoint({"step": 2}, path)
    assert writer.load_checkpoint(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    for name in (".a.ckpt.0123.partial", ".b.ckpt.4567.partial", "mine.partial"):
        (tmp_path / name).write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    assert {file.name for file in tmp_path.iterdir()} == {"a.ckpt", "mine.partial"}
