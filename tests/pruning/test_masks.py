from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import MaskError
from sparsefit.pruning.masks import pack_bits, unpack_bits


def random_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def mask_set(**shapes: tuple[int, int]) -> MaskSet:
    masks = MaskSet()
    for seed, (name, shape) in enumerate(shapes.items()):
        masks.add(f"{name}.weight", random_mask(*shape, seed=seed))
    return masks


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 9))


@pytest.fixture
def masks() -> MaskSet:
    return mask_set(**{"0": (5, 7), "2": (9, 5)})


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (8,), (9,), (3, 5), (8, 8), (2, 3, 11), (0, 4), (1, 4097), (300, 17)]
)
def test_bits_are_packed_as_numpy_packs_them(shape):
    for mask in (random_mask(*shape), torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)):
        packed = pack_bits(mask)
        assert packed.dtype == torch.uint8
        np.testing.assert_array_equal(packed.numpy(), np.packbits(mask.numpy().reshape(-1)))
        assert torch.equal(unpack_bits(packed, shape), mask)


def test_views_are_packed_by_their_values():
    mask = random_mask(6, 10)
    assert torch.equal(unpack_bits(pack_bits(mask.t()), (10, 6)), mask.t())


def test_sparsity_and_counts(masks):
    counts = {name: (mask.numel(), int((~mask).sum())) for name, mask in masks.items()}
    assert masks.counts() == counts
    assert masks.sparsity == sum(zeros for _, zeros in counts.values()) / (35 + 45)
    assert MaskSet().sparsity == 0


def test_save_and_load(masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    masks.add("conv.weight", random_mask(4, 6), transposed=True)
    masks.save(path)
    loaded = MaskSet.load(path)
    assert list(loaded) == list(masks)
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert torch.equal(loaded.for_parameter("conv.weight", torch.empty(6, 4)), masks["conv.weight"].t())
    assert loaded.digest() == masks.digest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["masks.safetensors"]


def test_an_empty_set_can_be_saved(tmp_path):
    MaskSet().save(tmp_path / "masks")
    assert len(MaskSet.load(tmp_path / "masks")) == 0


def test_state_dict_goes_through_a_checkpoint(masks, tmp_path):
    torch.save(masks.state_dict(), tmp_path / "checkpoint")
    loaded = MaskSet.from_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    assert loaded.digest() == masks.digest()


@pytest.mark.parametrize(
    "entry",
    [{}, {"bits": None}, None, {"bits": torch.zeros(4, dtype=torch.uint8), "shape": [5, 7], "transposed": False}],
)
def test_damaged_state_is_refused_by_name(masks, entry):
    with pytest.raises(MaskError, match=r"0\.weight is damaged"):
        MaskSet.from_state_dict(masks.state_dict() | {"0.weight": entry})


def test_one_bit_a_weight_on_disk(tmp_path):
    shapes = {str(i): (256, 1000) for i in range(8)}
    mask_set(**shapes).save(tmp_path / "masks")
    bits = sum(math.prod(shape) for shape in shapes.values())
    assert bits / 8 <= (tmp_path / "masks").stat().st_size <= bits / 8 + 2000


def test_digest_tells_masks_names_shapes_and_layouts_apart():
    mask = random_mask(4, 6)
    flipped = mask.clone()
    flipped[3, 5] ^= True
    sets = [
        [("a", mask, False)],
        [("a", flipped, False)],
        [("b", mask, False)],
        [("a", mask, True)],
        [("a", mask.reshape(6, 4), False)],
        [("a", mask, False), ("b", mask, False)],
        [],
    ]
    digests = set()
    for entries in sets:
        masks = MaskSet()
        for name, bits, transposed in entries:
            masks.add(name, bits, transposed)
        digests.add(masks.digest())
    assert len(digests) == len(sets)
    forward, backward = MaskSet(), MaskSet()
    for name in "ab":
        forward.add(name, mask)
    for name in "ba":
        backward.add(name, mask)
    assert forward.digest() == backward.digest()


def test_a_save_that_fails_keeps_the_old_file(masks, tmp_path, monkeypatch):
    path = tmp_path / "masks"
    masks.save(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mask_set(other=(3, 3)).save(path)
    assert MaskSet.load(path).digest() == masks.digest()


def test_a_file_with_any_byte_changed_is_refused_or_means_the_same(masks, tmp_path):
    path, damaged = tmp_path / "masks", tmp_path / "damaged"
    masks.save(path)
    content = path.read_bytes()
    refused = 0
    for position in range(len(content)):
        for flip in (0x01, 0x20, 0x80):
            changed = bytearray(content)
            changed[position] ^= flip
            damaged.write_bytes(changed)
            try:
                assert MaskSet.load(damaged).digest() == masks.digest(), (position, flip)
            except MaskError:
                refused += 1
    assert refused > 2.9 * len(content)


@pytest.mark.parametrize("length", [0, 1, 8, 100, 0.5, -1])
def test_a_file_that_was_cut_is_refused(masks, tmp_path, length):
    path = tmp_path / "masks"
    masks.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * length) if isinstance(length, float) else length])
    with pytest.raises(MaskError, match="masks is damaged"):
        MaskSet.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(MaskError, match=r"no mask file .*missing"):
        MaskSet.load(tmp_path / "missing")
    with pytest.raises(MaskError, match="no mask file"):
        MaskSet.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(MaskError, match="no mask file"):
        MaskSet.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_apply_and_verify(layers, masks, dtype):
    layers.to(dtype)
    with pytest.raises(MaskError, match=r"2 of 2 matrices: 0\.weight"):
        masks.verify(layers)
    dense = {name: p.detach().clone() for name, p in layers.named_parameters()}
    masks.apply(layers)
    for name, parameter in layers.named_parameters():
        assert torch.equal(parameter, torch.where(masks[name], dense[name], 0) if name in masks else dense[name])
    masks.verify(layers)
    masks.verify(layers.state_dict())
    row, column = (~masks["2.weight"]).nonzero()[4].tolist()
    for intruder in (1e-7, float("nan")):
        with torch.no_grad():
            layers[2].weight[row, column] = intruder
        with pytest.raises(MaskError, match=r"1 of 2 matrices: 2\.weight \(1\)"):
            masks.verify(layers)


@pytest.mark.parametrize("method", ["apply", "verify"])
@pytest.mark.parametrize(
    ("shapes", "cause"),
    [
        ({"0": (5, 7), "3": (9, 5)}, r"no parameter 3\.weight.*weight"),
        ({"0": (5, 7), "2": (5, 9)}, r"2\.weight is \(9, 5\), its mask \(5, 9\)"),
    ],
    ids=["missing", "shape"],
)
def test_masks_that_do_not_fit_change_nothing(layers, method, shapes, cause):
    before = layers[0].weight.detach().clone()
    with pytest.raises(MaskError, match=cause):
        getattr(mask_set(**shapes), method)(layers)
    assert torch.equal(layers[0].weight, before)


def test_masks_of_a_transposed_layer_lie_as_it_is_stored(tiny_model, tmp_path):
    model, other = tiny_model("gpt2"), tiny_model("gpt2")
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    masks = prune(model, [ids], PruningConfig(pattern="2:4")).masks
    name = "transformer.h.0.attn.c_attn.weight"
    assert masks[name].shape == (96, 32)
    assert model.get_parameter(name).shape == (32, 96)
    assert bool((masks[name].reshape(96, 8, 4).sum(dim=-1) == 2).all())
    assert torch.equal(masks.for_parameter(name, model.get_parameter(name)), model.get_parameter(name) != 0)
    masks.save(tmp_path / "masks")
    MaskSet.load(tmp_path / "masks").apply(other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_names_fit_a_model_inside_adapters(tiny_model):
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    masks = prune(tiny_model("llama"), [ids]).masks
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(MaskError):
        masks.verify(wrapped)
    masks.apply(wrapped)
    masks.verify(wrapped)
    masks.verify(wrapped.merge_and_unload())


def test_renamed():
    masks = mask_set(a=(2, 3)).renamed(lambda name: f"model.{name}")
    assert list(masks) == ["model.a.weight"]
