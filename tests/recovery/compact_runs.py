"""Small pruned runs to compress, and a comparison of files to the bit."""

from __future__ import annotations

import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparsefit import PruningConfig, prune
from sparsefit.recovery.export import export_base

IDS = torch.arange(3, 51).view(4, 12)
WEIGHT = "model.layers.1.mlp.down_proj.weight"


def pruned_run(model, folder, shard_size="50GB", **settings):
    """A run folder of a model that is pruned first; and its masks."""
    masks = prune(model, [{"input_ids": IDS}], PruningConfig(**settings)).masks
    saved = export_base(model, masks, folder / "base")
    if shard_size != "50GB":
        shutil.rmtree(folder / "base")
        model.save_pretrained(folder / "base", max_shard_size=shard_size, save_original_format=False)
    saved.save(folder / "masks.safetensors")
    return saved


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def same_bits(tensor, other):
    """Equal to the bit: -0.0 is not 0.0, and NaN is equal to itself."""
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    return tensor.contiguous().flatten().view(torch.uint8).equal(other.contiguous().flatten().view(torch.uint8))


def assert_same_files(one, other):
    """The weight files of two model folders have the same tensors, to the bit."""
    files = sorted(file.name for file in one.glob("model*.safetensors"))
    assert files == sorted(file.name for file in other.glob("model*.safetensors"))
    for file in files:
        before, after = load_file(one / file), load_file(other / file)
        assert before.keys() == after.keys()
        assert all(same_bits(before[name], after[name]) for name in before)
        with safe_open(one / file, "pt") as first, safe_open(other / file, "pt") as second:
            assert first.metadata() == second.metadata()
