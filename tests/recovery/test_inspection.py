from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsefit import PruningConfig, prune
from sparsefit.cli import main
from sparsefit.errors import MaskError, RunFolderError
from sparsefit.recovery.export import export_base
from sparsefit.recovery.inspection import inspect_folder

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def run(tmp_path, tiny_model):
    """A run folder with a model at 50% and its masks."""
    model = tiny_model("llama")
    masks = prune(model, [{"input_ids": torch.arange(3, 15).view(2, 6)}], PruningConfig()).masks
    export_base(model, masks, tmp_path / "run/base").save(tmp_path / "run/masks.safetensors")
    return tmp_path / "run"


def inspect(folder, monkeypatch, capsys):
    """Exit status and output of `sparsefit inspect FOLDER`."""
    monkeypatch.setattr(sys, "argv", ["sparsefit", "inspect", str(folder)])
    status = main()
    captured = capsys.readouterr()
    return status, " ".join((captured.out + captured.err).split())


def rewrite(run, change, file="base/model.safetensors"):
    tensors = load_file(run / file)
    change(tensors)
    save_file(tensors, run / file, metadata={"format": "pt"})


@pytest.mark.parametrize("place", ["", "base"])
def test_a_good_folder(run, monkeypatch, capsys, place):
    inspection = inspect_folder(run / place)
    tensors = load_file(run / "base/model.safetensors")
    assert inspection.sparsity == 0.5
    assert inspection.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert len(inspection.pruned) == 21
    zeros = {matrix.name: matrix.zeros for matrix in inspection.pruned}
    assert zeros == {name: int((tensors[name] == 0).sum()) for name in zeros}
    assert inspection.broken == {}
    account = inspection.account()
    assert (account["total"], account["zeros"]) == (0.5, sum(zeros.values()))
    assert json.dumps(account)

    status, output = inspect(run / place, monkeypatch, capsys)
    assert status == 0
    assert "50.00%" in output
    assert "All 21 masks hold" in output


def test_a_weight_brought_back(run, monkeypatch, capsys):
    def bring_back(tensors):
        flat = tensors[WEIGHT].view(-1)
        flat[(flat == 0).nonzero()[:3, 0]] = 1e-30

    rewrite(run, bring_back)
    assert inspect_folder(run).broken == {WEIGHT: 3}
    status, output = inspect(run, monkeypatch, capsys)
    assert status == 1
    assert f"{WEIGHT}: 3 weights that its mask prunes are not zero" in output
    assert "1 of 21 masks do not hold" in output


def test_no_masks(run, monkeypatch, capsys):
    (run / "masks.safetensors").unlink()
    assert inspect_folder(run).sparsity == 0.5  # the embeddings are dense and do not count
    status, output = inspect(run, monkeypatch, capsys)
    assert status == 0
    assert "50.00%" in output
    assert "no masks to check the model against" in output


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda run: cut(run / "masks.safetensors"), MaskError, "masks.safetensors is damaged"),
        (lambda run: flip_a_bit(run / "masks.safetensors"), MaskError, "masks.safetensors is damaged"),
        (lambda run: cut(run / "base/model.safetensors"), RunFolderError, "cannot be read"),
        (lambda run: (run / "base/model.safetensors").unlink(), RunFolderError, "holds no saved model"),
        (lambda run: rewrite(run, lambda tensors: tensors.pop(WEIGHT)), MaskError, f"it has no {WEIGHT}"),
        (
            lambda run: rewrite(run, lambda tensors: tensors.update({WEIGHT: torch.zeros(2, 2)})),
            MaskError,
            rf"{WEIGHT} is \(2, 2\), its mask \(32, 48\)",
        ),
        (
            lambda run: (run / "base/model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.st"}}'),
            RunFolderError,
            "gone.st cannot be read",
        ),
        (
            lambda run: (run / "base/model.safetensors.index.json").write_text("{"),
            RunFolderError,
            "index.json cannot be read",
        ),
        (lambda run: run.rename(run.with_name("moved")), RunFolderError, "there is no folder"),
    ],
)
def test_damaged_folders(run, monkeypatch, capsys, spoil, error, message):
    spoil(run)
    with pytest.raises(error, match=message):
        inspect_folder(run)
    status, output = inspect(run, monkeypatch, capsys)
    assert status == 2
    assert output.startswith(error.__name__)


def test_a_sharded_model(run, tmp_path, tiny_model):
    model = tiny_model("llama")
    model.load_state_dict(load_file(run / "base/model.safetensors"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    (tmp_path / "sharded/masks.safetensors").write_bytes((run / "masks.safetensors").read_bytes())
    inspection, whole = inspect_folder(tmp_path / "sharded"), inspect_folder(run)
    assert len(inspection.files) > 1
    assert inspection.broken == {}
    assert inspection.sparsity == 0.5
    assert inspection.parameters == whole.parameters
    assert {m.name: m.zeros for m in inspection.pruned} == {m.name: m.zeros for m in whole.pruned}
