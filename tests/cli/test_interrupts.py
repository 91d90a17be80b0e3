"""Ctrl-C: a real SIGINT, sent to this process as it comes to a certain place."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import sparsefit.cli.merge as merge_command
from sparsefit.files import replacing
from sparsefit.pruning import MaskSet

pytestmark = pytest.mark.slow


@pytest.fixture
def interrupt(monkeypatch):
    """Has a function of a class or module send SIGINT once, before or after it has done its work."""
    handler = signal.getsignal(signal.SIGINT)

    def at(owner, name, after=False):
        function, left = getattr(owner, name), [1]  # torch's optimizers keep what was put in the place of `step`

        def interrupted(*args, **kwargs):
            result = function(*args, **kwargs) if after or not left else None
            if left:
                left.clear()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.kill(os.getpid(), signal.SIGINT)
            return result

        monkeypatch.setattr(owner, name, interrupted)

    yield at
    signal.signal(signal.SIGINT, handler)


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_interrupt_of_the_reconstruction_leaves_a_folder_to_start_in_again(sparsefit, recipe, tmp_path, interrupt):
    recipe["reconstruction"] = {"passes": 2, "batch_size": 2}
    interrupt(torch.optim.Adam, "step")
    status, output, errors = sparsefit("fit", recipe=recipe)
    run = tmp_path / "run"
    assert (status, errors.endswith("interrupted"), "Traceback" in errors + output) == (130, True, False)
    report = json.loads((run / "report.json").read_text())
    assert (report["status"], list(report["perplexity"])) == ("interrupted", ["dense", "pruned"])
    assert not any((run / name).exists() for name in ("base", "masks.safetensors", "model", "checkpoints"))
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    assert json.loads((run / "report.json").read_text())["status"] == "finished"
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert (status, "is not empty" in errors) == (2, True)


@pytest.mark.parametrize("place", ["before", "while writing", "after"])
def test_an_interrupt_of_merge_leaves_a_whole_model_or_none(sparsefit, recipe, tmp_path, interrupt, place):
    recipe["model"]["init_args"]["adapter"] = {"r": 2, "form": "masked_lora"}
    assert sparsefit("fit", recipe=recipe)[0] == 0
    run, output = tmp_path / "run", tmp_path / "run/model"
    expected = load_file(output / "model.safetensors")
    shutil.rmtree(output)
    before = contents(run)
    owner, name = {
        "before": (merge_command, "merge"),
        "while writing": (PreTrainedModel, "save_pretrained"),
        "after": (shutil, "rmtree"),  # the first is that of what a killed run left
    }[place]
    interrupt(owner, name, after=place != "before")
    status, _, errors = sparsefit("merge", run)
    assert (status, errors.splitlines()[-1].endswith("interrupted"), "Traceback" in errors) == (130, True, False)
    assert contents(run) == before
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("model")) == []
    assert sparsefit("merge", run)[0] == 0
    MaskSet.load(run / "masks.safetensors").verify(load_file(output / "model.safetensors"))
    torch.testing.assert_close(load_file(output / "model.safetensors"), expected)


# After the old one was moved away; after one that a killed run left was deleted.
@pytest.mark.parametrize("at", [(os, "replace"), (shutil, "rmtree")], ids=["replace", "rmtree"])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, interrupt, at):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    (tmp_path / "model.old").mkdir()

    def write():
        with replacing(folder) as partial:
            (partial / "weights").write_text("new")
            interrupt(*at, after=True)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_text() == "old"
    with replacing(folder) as partial:
        (partial / "weights").write_text("new")
    assert ([path.name for path in tmp_path.iterdir()], (folder / "weights").read_text()) == (["model"], "new")
