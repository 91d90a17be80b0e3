from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from compact_runs import WEIGHT, assert_same_files, logits, pruned_run, same_bits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import RunFolderError
from sparsefit.modules.loading import load_tokenizer
from sparsefit.recovery.compact import architecture_of, compress_folder, expand_folder, load_compact, read_compact
from sparsefit.recovery.export import export_base
from sparsefit.recovery.inspection import inspect_folder

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def model_class(folder):
    return getattr(transformers, architecture_of(folder))


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("mixtral", {})],
    ids=["llama", "tied", "gpt2", "mixtral"],
)
def test_nothing_is_lost(tmp_path, tiny_model, architecture, changes, dtype, pattern):
    model = tiny_model(architecture, **changes).to(dtype)
    masks = pruned_run(model, tmp_path / "run", pattern=pattern)
    base = tmp_path / "run/base"
    report = compress_folder(tmp_path / "run", tmp_path / "compact")

    assert set(report.compact) == set(masks.parameters)
    dense = load_file(base / "model.safetensors")
    assert set(report.plain) == dense.keys() - set(report.compact)
    assert set(report.plain.values()) == {"has no mask"}
    held = load_file(tmp_path / "compact/model.compact.safetensors")
    for name in report.compact:
        assert held[f"{name}.kept"].dtype == dtype
        assert held[f"{name}.kept"].numel() == dense[name].numel() // 2
        assert held[f"{name}.bits"].nbytes == math.ceil(dense[name].numel() / 8)

    loaded = load_compact(tmp_path / "compact", model_class(tmp_path / "compact"))
    ordinary = AutoModelForCausalLM.from_pretrained(base)
    assert type(loaded) is type(ordinary)
    assert not loaded.training
    assert loaded.dtype == dtype
    before, after = ordinary.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    assert torch.equal(logits(loaded), logits(ordinary))
    masks.verify(loaded)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (ordinary.get_output_embeddings().weight is ordinary.get_input_embeddings().weight)
    assert loaded.generation_config == ordinary.generation_config
    assert loaded.config.to_dict() | {"_name_or_path": ""} == ordinary.config.to_dict() | {"_name_or_path": ""}

    expand_folder(tmp_path / "compact", tmp_path / "dense")
    assert_same_files(base, tmp_path / "dense")
    assert MaskSet.load(tmp_path / "dense/masks.safetensors").digest() == masks.digest()
    inspection = inspect_folder(tmp_path / "dense")
    assert not inspection.broken
    assert inspection.sparsity == 0.5


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_model_in_shards(tmp_path, tiny_model, architecture):
    model = tiny_model(architecture).to(torch.bfloat16)
    masks = pruned_run(model, tmp_path / "run", shard_size="20KB")
    shards = sorted(file.name for file in (tmp_path / "run/base").glob("*.safetensors"))
    assert len(shards) > 2
    report = compress_folder(tmp_path / "run", tmp_path / "compact")
    names = sorted(file.name for file in (tmp_path / "compact").glob("*.safetensors"))
    assert names == [shard.replace(".safetensors", ".compact.safetensors") for shard in shards]
    assert report.bytes_after == sum((tmp_path / "compact" / name).stat().st_size for name in names)
    ordinary = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run/base"))
    assert torch.equal(logits(load_compact(tmp_path / "compact", type(model))), ordinary)
    expand_folder(tmp_path / "compact", tmp_path / "dense")
    assert_same_files(tmp_path / "run/base", tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), ordinary)
    assert MaskSet.load(tmp_path / "dense/masks.safetensors").digest() == masks.digest()

    (tmp_path / "compact" / names[1]).unlink()
    with pytest.raises(RunFolderError, match=rf"not complete: it has no {names[1]}"):
        dict(read_compact(tmp_path / "compact"))


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_size_of_a_real_model(tmp_path, shared_data, pattern):
    source = shared_data / "tinystories656K"
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    text = (shared_data / "tinystories/val.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    tokens = load_tokenizer(str(source))([json.loads(line)["text"] for line in text]).input_ids
    batch = torch.tensor([ids[:64] for ids in tokens if len(ids) >= 64])
    masks = prune(model, [{"input_ids": batch}], PruningConfig(pattern=pattern)).masks
    export_base(model, masks, tmp_path / "run/base").save(tmp_path / "run/masks.safetensors")
    report = compress_folder(tmp_path / "run", tmp_path / "compact")

    held = load_file(tmp_path / "compact/model.compact.safetensors")
    dense = load_file(tmp_path / "run/base/model.safetensors")
    sizes = [held[f"{name}.{part}"].nbytes for name in report.compact for part in ("kept", "bits")]
    assert sum(sizes) / sum(dense[name].nbytes for name in report.compact) == 9 / 16
    # The header, with the digest of every tensor, is all that comes on top.
    plain = sum(dense[name].nbytes for name in report.plain)
    assert report.bytes_after - plain - sum(sizes) < 1000 * len(dense)
    assert report.bytes_before == (tmp_path / "run/base/model.safetensors").stat().st_size

    loaded = load_compact(tmp_path / "compact", LlamaForCausalLM)
    ordinary = LlamaForCausalLM.from_pretrained(tmp_path / "run/base")
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, ordinary(batch).logits)


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(5, 7), (8, 16), (3, 5, 7), (4, 3, 1, 1), (1, 1)])
def test_odd_numbers_and_shapes(tmp_path, shape, dtype, with_masks):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    masks = MaskSet()
    if len(shape) == 3:
        for index in range(shape[0]):
            masks.add(f"w[{index}]", torch.rand(shape[2], shape[1]) < 0.5, transposed=True)
    else:
        masks.add("w", torch.rand(shape[:2]) < 0.5)
    keep = masks.for_parameter("w", weight)
    weight[~keep] = 0
    # Kept weights that no comparison with zero finds, or that are not equal to themselves.
    bits = weight.view(INTEGERS[dtype])
    odd = [torch.tensor(-0.0, dtype=dtype).view(INTEGERS[dtype]), torch.tensor(-1, dtype=INTEGERS[dtype])]  # -1: a NaN
    for place, value in zip(keep.nonzero()[:2].tolist(), odd, strict=False):
        bits[tuple(place)] = value
    if keep.sum() > 2:
        weight[tuple(keep.nonzero()[2].tolist())] = 0
    (tmp_path / "model").mkdir()
    others = {
        "ids": torch.arange(3),
        "flag": torch.tensor(True),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 4),
    }
    save_file({"w": weight} | others, tmp_path / "model/model.safetensors", metadata={"format": "pt", "x": "é"})
    if with_masks:
        masks.save(tmp_path / "masks.safetensors")

    compress_folder(tmp_path / "model", tmp_path / "compact")
    read = dict(read_compact(tmp_path / "compact"))
    assert read.keys() == {"w", *others}
    assert all(same_bits(read[name], tensor) for name, tensor in ({"w": weight} | others).items())
    expand_folder(tmp_path / "compact", tmp_path / "dense")
    assert_same_files(tmp_path / "model", tmp_path / "dense")
    assert (tmp_path / "dense/masks.safetensors").exists() == with_masks
    if with_masks:
        assert MaskSet.load(tmp_path / "dense/masks.safetensors").digest() == masks.digest()


def test_matrices_of_many_chunks(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsefit.recovery.compact_layout._CHUNK", 100)
    compress_folder(run, tmp_path / "compact")
    expand_folder(tmp_path / "compact", tmp_path / "dense")
    assert_same_files(run / "base", tmp_path / "dense")


def test_without_masks_the_zeros_tell(run, tmp_path):
    (run / "masks.safetensors").unlink()
    report = compress_folder(run, tmp_path / "compact")
    dense = load_file(run / "base/model.safetensors")
    assert set(report.compact) == {name for name, tensor in dense.items() if (tensor == 0).float().mean() == 0.5}
    assert report.plain["model.norm.weight"] == "not a matrix"
    assert report.plain["model.embed_tokens.weight"] == "too few zeros to become smaller"
    expand_folder(tmp_path / "compact", tmp_path / "dense")
    assert_same_files(run / "base", tmp_path / "dense")
    assert not (tmp_path / "dense/masks.safetensors").exists()


def test_masks_that_are_given(run, tmp_path):
    masks = MaskSet.load(run / "masks.safetensors")
    (run / "masks.safetensors").unlink()
    report = compress_folder(run / "base", tmp_path / "compact", masks.of_parameter(WEIGHT))
    assert report.compact == [WEIGHT]


def test_quantized_weights_stay_as_they_are(tmp_path):
    packed, mask = torch.randint(0, 255, (32, 1), dtype=torch.uint8), torch.rand(8, 8) < 0.5
    (tmp_path / "model").mkdir()
    save_file({"layer.weight": packed}, tmp_path / "model/model.safetensors")
    masks = MaskSet()
    masks.add("layer.weight", mask)
    masks.save(tmp_path / "model/masks.safetensors")
    report = compress_folder(tmp_path / "model", tmp_path / "compact")
    assert report.plain == {"layer.weight": "quantized or no weights: torch.uint8"}
    expand_folder(tmp_path / "compact", tmp_path / "dense")
    assert_same_files(tmp_path / "model", tmp_path / "dense")
    assert MaskSet.load(tmp_path / "dense/masks.safetensors").digest() == masks.digest()


def test_what_lies_beside_the_weights_goes_along(run, tmp_path):
    load_tokenizer("tiny-llama").save_pretrained(run / "base")
    (run / "base/additional_chat_templates").mkdir()
    (run / "base/additional_chat_templates/tool.jinja").write_text("{{ messages }}")
    (run / "base/pytorch_model.bin").write_bytes(b"the same weights once more")
    compress_folder(run, tmp_path / "compact")
    expand_folder(tmp_path / "compact", tmp_path / "dense")
    for folder in (tmp_path / "compact", tmp_path / "dense"):
        assert AutoTokenizer.from_pretrained(folder)("a b").input_ids == load_tokenizer("tiny-llama")("a b").input_ids
        assert (folder / "additional_chat_templates/tool.jinja").is_file()
        assert not (folder / "pytorch_model.bin").exists()
    assert not (tmp_path / "compact/masks.safetensors").exists()  # the bits are the masks
