"""Compact folders that are damaged, and what cannot be compressed."""

from __future__ import annotations

import pytest
import torch
import transformers
from compact_runs import WEIGHT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from sparsefit import MaskSet
from sparsefit.errors import ConfigError, MaskError, RunFolderError
from sparsefit.recovery.compact import compress_folder, expand_folder, load_compact


@pytest.mark.parametrize("value", [1e-30, -0.0, float("nan")])
def test_a_pruned_weight_that_is_not_zero(run, tmp_path, value):
    tensors = load_file(run / "base/model.safetensors")
    flat = tensors[WEIGHT].view(-1)
    flat[(flat == 0).nonzero()[:3, 0]] = value
    save_file(tensors, run / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MaskError, match=rf"{WEIGHT} in .* has 3 weights that its mask prunes"):
        compress_folder(run, tmp_path / "compact")
    assert not list(tmp_path.glob("compact*"))


def test_masks_that_do_not_fit(run, tmp_path):
    masks = MaskSet.load(run / "masks.safetensors")
    masks.add("model.layers.7.mlp.down_proj.weight", torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(MaskError, match=r"it has no model\.layers\.7\.mlp\.down_proj\.weight"):
        compress_folder(run, tmp_path / "compact", masks)
    masks = MaskSet.load(run / "masks.safetensors")
    masks.add(WEIGHT, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(MaskError, match="the masks do not fit the model"):
        compress_folder(run, tmp_path / "compact", masks)
    assert not list(tmp_path.glob("compact*"))


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def change_a_value(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata=metadata)


def another_version(file):
    save_file(load_file(file), file, metadata={"format": "sparsefit-compact-2"})


def another_file(file):
    save_file({"x": torch.zeros(1)}, file)


def broken_metadata(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata=metadata | {"tensors": '[{"name": 1}]'})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cannot be read"),
        (flip_a_bit, "is damaged"),
        (change_a_value, r"is damaged: model\.norm\.weight is not what was saved"),
        (another_version, "its format is 'sparsefit-compact-2'"),
        (another_file, "no compact file of this version: its format is None"),
        (broken_metadata, "its metadata cannot be read"),
        (lambda file: file.write_text("no tensors"), "cannot be read"),
    ],
)
def test_damage_is_told_of(run, tmp_path, damage, message):
    compress_folder(run, tmp_path / "compact")
    damage(tmp_path / "compact/model.compact.safetensors")
    with pytest.raises(RunFolderError, match=message):
        load_compact(tmp_path / "compact", LlamaForCausalLM)
    with pytest.raises(RunFolderError, match=message):
        expand_folder(tmp_path / "compact", tmp_path / "dense")
    assert not list(tmp_path.glob("dense*"))


def test_wrong_folders(run, tmp_path):
    compress_folder(run, tmp_path / "compact")
    with pytest.raises(RunFolderError, match="there is no folder"):
        expand_folder(tmp_path / "nowhere", tmp_path / "dense")
    with pytest.raises(RunFolderError, match="there is no folder"):
        compress_folder(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(RunFolderError, match="holds no compact model"):
        expand_folder(run / "base", tmp_path / "dense")
    with pytest.raises(RunFolderError, match="is a compact folder already"):
        compress_folder(tmp_path / "compact", tmp_path / "again")
    with pytest.raises(RunFolderError, match="exists and is not an empty folder"):
        compress_folder(run, tmp_path / "compact")
    (tmp_path / "new.partial/left").mkdir(parents=True)  # by an export that was killed
    compress_folder(run, tmp_path / "new")
    assert not (tmp_path / "new.partial").exists()
    assert not (tmp_path / "new/left").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        compress_folder(run, tmp_path / "file/compact")
    (tmp_path / "empty").mkdir()
    compress_folder(run, tmp_path / "empty")
    with pytest.raises(
        ConfigError, match=r"does not fill a Qwen3ForCausalLM: it has no .* saved from a LlamaForCausalLM"
    ):
        load_compact(tmp_path / "empty", transformers.Qwen3ForCausalLM)
    (tmp_path / "empty/config.json").unlink()
    with pytest.raises(RunFolderError, match="does not say of which class the model is"):
        load_compact(tmp_path / "empty", LlamaForCausalLM)
