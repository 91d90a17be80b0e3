"""The ends of runs in a custom loop: runs that are killed at any time are resumed by the callbacks alone."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback
from resumed_runs import assert_same, data, fit, module, weights

from sparsefit.callbacks import RunReport, SparseCheckpoints, WandaPruning, run_outputs
from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.recovery.run_files import damaged_files, read_state

STEPS = 3


class Killed(BaseException):
    """Ends a fit as a signal would: no callback may do anything after it."""


@pytest.fixture
def killed(monkeypatch):
    """Fits meanwhile end as if a signal had ended their process."""

    @contextmanager
    def dies():
        with monkeypatch.context() as patch, pytest.raises(Killed):  # noqa: PT012 (the caller has one statement in it)
            patch.setattr(RunReport, "on_exception", lambda self, *args: self.folder.release())
            yield patch

    return dies


class Kill(Callback):
    """Raises in a hook, the n-th time it is called."""

    def __init__(self, hook, number=1):
        self.left = number
        setattr(self, hook, self.count)

    def count(self, *args):
        self.left -= 1
        if self.left == 0:
            raise Killed


class StopEarly(Callback):
    """Ends a run as a budget does, or early stopping: by no limit of the trainer."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == STEPS


def callbacks(folder, resume=False, saver_first=True):
    both = [SparseCheckpoints(str(folder)), RunReport(str(folder), resume=resume), WandaPruning()]
    return both if saver_first else both[::-1]


def go_on(folder, *more, saver_first=True, **settings):
    """The same script again: new objects, and `resume=True`."""
    trained, used = module(), callbacks(folder, resume=True, saver_first=saver_first)
    report = used[1]
    fit(trained, data(folder.parent), *used, *more, ckpt_path=report.checkpoint, **({"max_steps": STEPS} | settings))
    return weights(trained), report


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trained = module()
    fit(trained, data(folder), *callbacks(folder / "run"), max_steps=STEPS)
    return weights(trained)


KILLS = {
    "before pruning": ("on_fit_start", 1, "claimed"),
    "in training, before any checkpoint of the user's": ("on_train_batch_end", 2, "training"),
    "as training ends": ("on_train_end", 1, "training"),
}


@pytest.mark.slow
@pytest.mark.parametrize("saver_first", [True, False])
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_continues_to_the_same_weights(straight, tmp_path, killed, name, saver_first):
    hook, number, state = KILLS[name]
    run = tmp_path / "run"
    used = callbacks(run, saver_first=saver_first)
    used.insert(0 if hook == "on_train_end" else 3, Kill(hook, number))
    if hook == "on_fit_start":  # between the claim and the pruning
        used = [used[1], used[3], used[0], used[2]]
    with killed():
        fit(module(), data(tmp_path), *used, max_steps=STEPS)
    assert read_state(run).name == state
    found, _ = go_on(run, saver_first=saver_first)
    assert_same(found, straight)
    assert read_state(run).name == report_of(run)["status"] == "finished"


ENDS = {
    "max_steps": ({"max_steps": STEPS}, []),
    "max_epochs": ({"max_steps": -1, "max_epochs": 1, "limit_train_batches": STEPS}, []),
    "stopped": ({"max_steps": -1}, [StopEarly()]),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_run_its_end_is_made_up_for(straight, tmp_path, end, killed, caplog):
    settings, more = ENDS[end]
    run = tmp_path / "run"

    def kill(*args, **kwargs):
        raise Killed

    with killed() as patch:
        patch.setattr(run_outputs, "merged_in_place", kill)
        fit(module(), data(tmp_path), *callbacks(run), *more, **settings)
    assert read_state(run).name == "closing"
    found, _ = go_on(run, *more, **settings)
    assert_same(found, straight)
    assert "its results are incomplete" in caplog.text
    assert read_state(run).name == report_of(run)["status"] == "finished"
    assert report_of(run)["training"]["steps"] == STEPS
    assert (run / "adapter/adapter_model.safetensors").exists()
    # And once more, with nothing left to do.
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.suffix != ".ckpt"}
    found, report = go_on(run, *more, **settings)
    assert_same(found, straight)
    assert "is finished: nothing was left to do" in caplog.text
    assert report.report["status"] == "finished"
    changed = [file.name for file, content in before.items() if file.read_bytes() != content]
    assert changed == [] if end != "stopped" else set(changed) <= {"config.yaml"}
    # More steps are taken from there.
    if end == "max_steps":
        go_on(run, max_steps=STEPS + 1)
        assert report_of(run)["training"]["steps"] == STEPS + 1


@pytest.mark.slow
def test_nothing_finished_is_lost_by_a_failure_after_it(tmp_path, monkeypatch):
    """A disk that is full when the report is written, after the model was."""
    run, opened = tmp_path / "run", open

    def full(path, mode="r", *args, **kwargs):
        if "report." in os.path.basename(str(path)) and mode == "x" and (run / "model").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        with pytest.raises(RunFolderError, match=r"report.html cannot be written: .*No space left.* Free some space"):
            fit(module(form="masked_lora"), data(tmp_path), *callbacks(run), max_steps=STEPS)
    model = (run / "model/model.safetensors").read_bytes()
    assert not [path for path in run.iterdir() if path.suffix in (".partial", ".old")]
    assert read_state(run).name == "failed"
    trained, used = module(form="masked_lora"), callbacks(run, resume=True)
    fit(trained, data(tmp_path), *used, ckpt_path=used[1].checkpoint, max_steps=STEPS)
    assert read_state(run).name == "finished"
    assert (run / "model/model.safetensors").read_bytes() == model
    assert not damaged_files(run)

    # A longer run that breaks off leaves what the first one has made.
    results = {file: file.read_bytes() for part in ("adapter", "model") for file in (run / part).iterdir()}
    report = (run / "report.json").read_bytes()
    trained, used = module(form="masked_lora"), callbacks(run, resume=True)
    with pytest.raises(RuntimeError, match="boom"):
        fit(trained, data(tmp_path), *used, Boom(), ckpt_path=used[1].checkpoint, max_steps=STEPS + 2)
    assert read_state(run).name == "failed"
    assert {file: file.read_bytes() for part in ("adapter", "model") for file in (run / part).iterdir()} == results
    assert json.loads(report)["perplexity"]["recovered"] > 0


class Boom(Callback):
    def on_train_batch_end(self, trainer, *args):
        raise RuntimeError("boom")


def test_a_folder_with_a_run_is_not_begun_anew(tmp_path):
    run = tmp_path / "run"
    fit(module(), data(tmp_path), *callbacks(run), max_steps=1)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(RunFolderError, match=r"RunReport\(folder, resume=True\)"):
        fit(module(), data(tmp_path), *callbacks(run), max_steps=1)
    with pytest.raises(RunFolderError, match=r"has a checkpoint, .*ckpt_path=report\.checkpoint"):
        fit(module(), data(tmp_path), *callbacks(run, resume=True), max_steps=1)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_hook_of_a_callback_that_is_not_of_the_kind_is_refused(tmp_path):
    class Mine(Callback):
        def on_base_ready(self, *args):
            pytest.fail("called")

    trained = module()
    before = weights(trained)
    with pytest.raises(ConfigError, match=r"Mine has on_base_ready.* derive it from .*PrunedRunCallback"):
        fit(trained, data(tmp_path), WandaPruning(), Mine(), max_steps=1)
    assert_same(weights(trained), before)


def test_a_checkpoint_with_objects_is_not_read_unasked(tmp_path):
    run = tmp_path / "run"
    fit(module(), data(tmp_path), *callbacks(run), max_steps=1)
    path = run / "checkpoints/stage.ckpt"
    torch.save(torch.load(path, weights_only=True) | {"mine": Boom()}, path)
    with pytest.raises(RunFolderError, match=r"holds objects.*weights_only=False"):
        go_on(run)
