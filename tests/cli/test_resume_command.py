"""`sparsefit fit --ckpt_path`: with other settings, and in other folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from sparsefit.cli.resuming import move_paths

pytestmark = pytest.mark.slow


@pytest.fixture
def finished(sparsefit, recipe, tmp_path):
    """A finished run of three steps, and the arguments that have it take two more."""
    saver = {"dirpath": str(tmp_path / "run/checkpoints"), "save_last": True, "enable_version_counter": False}
    recipe["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver | {"every_n_train_steps": 1}}
    ]
    recipe["budget"]["drive_learning_rate"] = False
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors

    def arguments(folder, *more, checkpoints=None):
        path = (checkpoints or folder) / "checkpoints/last.ckpt"
        return "fit", f"--config={folder}/config.yaml", f"--ckpt_path={path}", "--trainer.max_steps=5", *more

    return tmp_path / "run", arguments


def contents(folder):
    files = (file for file in folder.rglob("*") if file.is_file() and "logs" not in file.parts)
    return {file.relative_to(folder): file.read_bytes() for file in files}


def steps(folder):
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return json.loads((folder / "report.json").read_text())["training"]["steps"], state


OTHERS = {
    "--data.init_args.batch_size=4": "batch_size was 2 and is 4",
    "--model.init_args.distill.weight=0.5": "distill was None and is {'weight': 0.5, 'temperature': 1.0}",
}


def test_other_settings_are_named_and_nothing_is_overwritten(sparsefit, finished):
    run, arguments = finished
    before = contents(run)
    for argument, message in OTHERS.items():
        status, _, errors = sparsefit(*arguments(run, argument))
        assert (status, message in errors, "config.yaml in the run folder" in errors) == (2, True, True), errors
        assert contents(run) == before


def test_a_moved_run_continues_where_it_is(sparsefit, finished, tmp_path, caplog):
    run, arguments = finished
    shutil.copytree(run, tmp_path / "whole")
    assert sparsefit(*arguments(run))[0] == 0
    expected = steps(run)[1]
    shutil.rmtree(run)
    moved = (tmp_path / "whole").rename(tmp_path / "moved")
    status, _, errors = sparsefit(*arguments(moved))
    assert status == 0, errors
    assert f"The run was moved from {run} to {moved}" in caplog.text
    assert not run.exists()
    done, state = steps(moved)
    assert done == 5
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    settings = yaml.safe_load((moved / "config.yaml").read_text())
    assert settings["run"]["folder"] == str(moved)
    assert settings["trainer"]["callbacks"][0]["init_args"]["dirpath"] == str(moved / "checkpoints")


def test_for_a_run_and_its_copy_the_user_must_say_which_to_resume(sparsefit, finished, tmp_path):
    run, arguments = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    before = contents(run), contents(copy)
    status, _, errors = sparsefit(*arguments(copy))
    assert status == 2
    assert all(name in errors for name in (f"is in the run folder {copy}", f"folder {run}", "--run.folder="))
    assert (contents(run), contents(copy)) == before
    status, _, errors = sparsefit(*arguments(copy, f"--run.folder={copy}", "--trainer.callbacks=[]"))
    assert status == 0, errors
    assert contents(run) == before[0]
    assert steps(copy)[0] == 5


def test_a_run_may_continue_in_another_folder_and_says_so(sparsefit, finished, tmp_path, caplog):
    run, arguments = finished
    before = contents(run)
    new = tmp_path / "new"
    status, _, errors = sparsefit(*arguments(run, f"--run.folder={new}", "--trainer.callbacks=[]"))
    assert status == 0, errors
    assert f"is of the run in {run}, which is left as it is" in caplog.text
    assert contents(run) == before
    assert steps(new)[0] == 5
    assert (new / "base").is_dir()


def test_paths_in_a_folder_are_moved_and_no_others(tmp_path):
    old, new = tmp_path / "a", tmp_path / "b"
    settings = {"one": str(old / "x"), "two": [str(old), f"{old}bc", 3, None], "three": {"four": "a"}}
    moved = {"one": str(new / "x"), "two": [str(new), f"{old}bc", 3, None], "three": {"four": "a"}}
    assert move_paths(settings, old, new) == moved
