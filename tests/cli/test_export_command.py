from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from sparsefit import MaskSet, prune
from sparsefit.cli.export import export
from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.recovery.export import export_base


@pytest.fixture
def run(tmp_path, tiny_model):
    model = tiny_model("llama").to(torch.bfloat16)
    masks = prune(model, [{"input_ids": torch.arange(3, 15).view(2, 6)}]).masks
    export_base(model, masks, tmp_path / "run/base").save(tmp_path / "run/masks.safetensors")
    return tmp_path / "run"


def size(folder):
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


@pytest.mark.parametrize("place", ["", "base"])
def test_there_and_back(run, tmp_path, capsys, place):
    assert export([str(run / place), "--output", str(tmp_path / "compact"), "--format", "compact"]) == 0
    output = capsys.readouterr().out
    before, after = size(run / "base"), size(tmp_path / "compact")
    assert f"{before:,} bytes" in output
    assert f"{after:,} bytes of weights ({after / before:.1%})" in output
    assert re.search(r"21 tensors as kept values and bits; \d+ as they are \(has no mask\)", output)

    assert export([str(tmp_path / "compact"), "--output", str(tmp_path / "dense"), "--format", "dense"]) == 0
    assert f"{before:,} bytes" in capsys.readouterr().out
    tensors, again = (load_file(folder / "model.safetensors") for folder in (run / "base", tmp_path / "dense"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    digests = [MaskSet.load(folder / "masks.safetensors").digest() for folder in (run, tmp_path / "dense")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("missing", ["--output", "--format"])
def test_what_must_be_given(run, tmp_path, missing):
    arguments = {"--output": str(tmp_path / "new"), "--format": "compact"}
    arguments.pop(missing)
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        export([str(run), *(part for pair in arguments.items() for part in pair)])


def test_a_wrong_folder_is_an_error_that_the_command_line_shows(run, tmp_path):
    with pytest.raises(RunFolderError, match="holds no compact model"):
        export([str(run), "--output", str(tmp_path / "new"), "--format", "dense"])
    assert not (tmp_path / "new").exists()
