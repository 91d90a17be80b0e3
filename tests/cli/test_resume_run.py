"""`sparsefit fit --resume RUN`: from every state that a run can be in, and from no damage without a word."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparsefit.callbacks import RunReport, run_folder
from sparsefit.errors import RunFolderError
from sparsefit.files import changed_files, lock_folder, write_text
from sparsefit.recovery.run_files import RunState, damaged_files, read_state

pytestmark = pytest.mark.slow


def report_of(run):
    return json.loads((run / "report.json").read_text())


@pytest.fixture
def recipe(recipe):
    adapter = {"r": 2, "dropout": 0.0, "form": "masked_lora", "target_modules": "all-linear"}
    recipe["model"]["init_args"]["adapter"] = adapter
    recipe["budget"]["drive_learning_rate"] = False
    return recipe


@pytest.fixture
def broken(monkeypatch):
    """Has a method of `RunReport` raise, as a process ends that is killed there: nothing after it happens."""

    def break_at(name, call=1):
        method, calls = getattr(RunReport, name), []

        def wrapped(self, *args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                monkeypatch.setattr(RunReport, "on_exception", lambda self, *args: self.folder.release())
                raise RuntimeError("killed")
            return method(self, *args, **kwargs)

        monkeypatch.setattr(RunReport, name, wrapped)

    return break_at


def finished(sparsefit, recipe, tmp_path):
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    return tmp_path / "run"


ENDS = {"max_steps": {"max_steps": 3}, "max_epochs": {"max_epochs": 1, "limit_train_batches": 3, "max_steps": -1}}
MOMENTS = {
    "before anything is pruned": ("on_pruning_start", 1, "claimed"),
    "before training": ("on_train_start", 1, "pruned"),
    "as the adapter is written": ("_export_trained", 1, "closing"),
    "as the model is merged": ("_merge", 1, "closing"),
    "as the report is written": ("_finish", 1, "closing"),
}


PARTS = ("model/model.safetensors", "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed():
    """What a run that nothing has happened to has written, by what ends it."""
    return {}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_continues_from_every_state(
    sparsefit, recipe, tmp_path, broken, monkeypatch, caplog, undisturbed, moment, end
):
    recipe["trainer"] |= ENDS[end]
    name, call, state = MOMENTS[moment]
    broken(name, call)
    with pytest.raises(RuntimeError, match="killed"):
        sparsefit("fit", recipe=recipe)
    run = tmp_path / "run"
    assert read_state(run).name == state
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    status, _, errors = sparsefit("fit", "--resume", run)
    assert status == 0, errors
    assert read_state(run).name == report_of(run)["status"] == "finished"
    assert report_of(run)["training"]["steps"] == 3
    assert set(report_of(run)["perplexity"]) == {"dense", "pruned", "recovered", "merged"}
    assert not damaged_files(run)
    assert (run / "model/model.safetensors").exists()
    if state == "closing":
        assert "its results are incomplete" in caplog.text
    shutil.move(run, tmp_path / "resumed")
    if end not in undisturbed:
        recipe["run"]["folder"] = str(run)
        straight = finished(sparsefit, recipe, tmp_path)
        undisturbed[end] = {part: load_file(straight / part) for part in PARTS}
    for part, expected in undisturbed[end].items():
        found = load_file(tmp_path / "resumed" / part)
        assert all((found[name] == expected[name]).all() for name in expected), part


def test_a_finished_run_has_nothing_left_to_do_and_makes_anew_what_its_end_made(sparsefit, recipe, tmp_path, caplog):
    run = finished(sparsefit, recipe, tmp_path)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    status, output, _ = sparsefit("fit", "--resume", run)
    assert (status, "nothing is left to do" in output) == (0, True)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    # A checkpoint that is named says the same, once it is read.
    status, _, errors = sparsefit("fit", f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/stage.ckpt")
    assert status == 0, errors
    assert {file: file.read_bytes() for file in (run / "model").iterdir()} == {
        file: data for file, data in before.items() if file.parent == run / "model"
    }

    damaged = run / "model/model.safetensors"
    damaged.write_bytes(before[damaged][:-1] + bytes([before[damaged][-1] ^ 1]))
    status, _, errors = sparsefit("fit", "--resume", run)
    assert status == 0, errors
    assert "model/model.safetensors is not what its SHA256SUMS says" in caplog.text
    assert damaged.read_bytes() == before[damaged]
    assert not damaged_files(run)


def test_a_longer_run_takes_more_steps_and_its_own_place(sparsefit, recipe, tmp_path):
    run = finished(sparsefit, recipe, tmp_path)
    moved = run.rename(tmp_path / "moved")
    status, _, errors = sparsefit("fit", "--resume", moved, "--trainer.max_steps=5")
    assert status == 0, errors
    assert report_of(moved)["training"]["steps"] == 5
    assert not run.exists()
    settings = yaml.safe_load((moved / "config.yaml").read_text())
    assert settings["run"]["folder"] == str(moved)
    assert settings["run"]["resume"] is False


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_as_a_resumed_run_replaces_its_recipe(sparsefit, recipe, tmp_path, monkeypatch, moment):
    run = finished(sparsefit, recipe, tmp_path)

    def killed(text, path):
        if moment == "after":
            write_text(text, path)
        monkeypatch.setattr(RunReport, "on_exception", lambda self, *args: self.folder.release())
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("sparsefit.callbacks.run_folder.write_text", killed)
        with pytest.raises(RuntimeError, match="killed"):
            sparsefit("fit", "--resume", run, "--trainer.max_steps=5")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert not damaged_files(run)
    status, _, errors = sparsefit("fit", "--resume", run, "--trainer.max_steps=5")
    assert status == 0, errors
    assert len(read_state(run).sums["config.yaml"].split()) == 1


def test_a_run_continues_with_another_number_of_devices(sparsefit, recipe, tmp_path):
    run = finished(sparsefit, recipe, tmp_path)
    for path in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        mine = checkpoint["sparsefit"]
        mine |= {"world_size": 2, "random": mine["random"] * 2, "training": mine["training"] * 2}
        torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="from a run on 2 devices, and this one has 1"):
        status, _, errors = sparsefit("fit", "--resume", run, "--trainer.max_steps=5")
    assert status == 0, errors
    assert report_of(run)["training"]["steps"] == 5


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_a_copy_never_reads_the_base_of_the_original(sparsefit, recipe, tmp_path):
    run = finished(sparsefit, recipe, tmp_path)
    copy = shutil.copytree(run, tmp_path / "copy")
    flipped(copy / "base/model.safetensors")
    status, _, errors = sparsefit("fit", "--resume", copy, "--trainer.max_steps=5")
    assert (status, str(copy) in errors, "damaged" in errors) == (2, True, True), errors
    shutil.rmtree(copy / "base")
    status, _, errors = sparsefit("fit", "--resume", copy, "--trainer.max_steps=5")
    assert (status, "the sparse base that it goes with was not found" in errors) == (2, True), errors


NAMED = {
    "base/model.safetensors": ("merge", "inspect", "export"),
    "base/config.json": ("merge", "inspect", "export"),
    "adapter/adapter_model.safetensors": ("merge", "inspect"),
    "adapter/sparsefit.json": ("merge", "inspect"),
    "model/model.safetensors": ("inspect",),
    "model/tokenizer_config.json": ("inspect",),
    "checkpoints/stage.ckpt": ("inspect", "fit"),
    "masks.safetensors": ("inspect", "merge", "fit"),
    "config.yaml": ("inspect", "fit"),
    "state.json": ("inspect", "fit", "merge"),
    "report.json": ("inspect",),
    "report.html": ("inspect",),
}


def test_a_flipped_bit_is_named_by_every_command_that_reads_the_file(sparsefit, recipe, tmp_path):
    run = finished(sparsefit, recipe, tmp_path)
    for name, commands in NAMED.items():
        before = (run / name).read_bytes()
        flipped(run / name)
        for command in commands:
            arguments = {
                "merge": ("merge", run, "--output", tmp_path / "out"),
                "inspect": ("inspect", run),
                "export": ("export", run / "base", "--output", tmp_path / "out", "--format", "gguf"),
                "fit": ("fit", "--resume", run, "--trainer.max_steps=5"),
            }[command]
            status, output, errors = sparsefit(*arguments)
            assert status in (1, 2), (name, command, output, errors)
            assert name.rpartition("/")[2] in output + errors, (name, command, output, errors)
            assert "Traceback" not in errors
        (run / name).write_bytes(before)
    assert sparsefit("inspect", run)[0] == 0
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_to_one_run(sparsefit, recipe, tmp_path, monkeypatch):
    run = finished(sparsefit, recipe, tmp_path)
    monkeypatch.setattr(run_folder, "_ORPHANS_END", 0.1)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    lock = lock_folder(run, "run")
    try:
        status, _, errors = sparsefit("fit", "--resume", run, "--trainer.max_steps=5")
    finally:
        lock.release()
    assert (status, f"another run is running in {run}" in errors) == (2, True), errors
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert sparsefit("fit", "--resume", run, "--trainer.max_steps=5")[0] == 0


def test_what_is_no_run_of_the_command_is_reported(sparsefit, tmp_path):
    (tmp_path / "other").mkdir()
    for folder, message in ((tmp_path / "nowhere", "no run folder"), (tmp_path / "other", "has no config.yaml")):
        status, _, errors = sparsefit("fit", "--resume", folder)
        assert (status, message in errors) == (2, True), errors


def test_results_of_a_run_that_has_not_ended_are_not_taken_for_its_own(sparsefit, recipe, tmp_path):
    run = finished(sparsefit, recipe, tmp_path)
    state = read_state(run)
    RunState("closing", state.run, 3, sums=state.sums).write(run)
    for command in (("inspect", run), ("merge", run), ("export", run, "--format=gguf", "--output", run / "x")):
        status, _, errors = sparsefit(*command)
        assert (status, "has not ended" in errors, f"--resume {run}" in errors) == (2, True, True), errors


def test_files_have_the_rights_of_the_umask_and_sums(sparsefit, recipe, tmp_path):
    run = finished(sparsefit, recipe, tmp_path)
    (tmp_path / "plain").write_text("")
    rights = (tmp_path / "plain").stat().st_mode
    files = [file for file in run.rglob("*") if file.is_file() and "logs" not in file.parts]
    assert {file.name: file.stat().st_mode for file in files if file.stat().st_mode != rights} == {}
    for part in ("base", "adapter", "model"):
        assert (run / part / "SHA256SUMS").is_file()
        assert changed_files(run / part) == []


def test_a_damaged_state_is_an_error_of_its_own(tmp_path):
    RunState("training", "id", 3).write(tmp_path)
    assert read_state(tmp_path) == RunState("training", "id", 3)
    (tmp_path / "state.json").write_text((tmp_path / "state.json").read_text().replace("training", "finished"))
    with pytest.raises(RunFolderError, match=r"state\.json is damaged"):
        read_state(tmp_path)
