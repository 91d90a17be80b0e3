"""`sparsefit export`: what other programs read is the model, and its zeros are there."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
)
from transformers import ViTForImageClassification as ViT

import sparsefit
from sparsefit import prune
from sparsefit.errors import ConfigError
from sparsefit.modules.loading import load_tokenizer
from sparsefit.recovery.export import export_base
from sparsefit.recovery.inspection import inspect_folder
from sparsefit.serving.export_libraries import LIBRARIES, missing_for
from sparsefit.serving.exported_graphs import sample_inputs
from sparsefit.serving.gguf_file import pre_tokenizer

pytestmark = pytest.mark.slow

ASSETS = Path(sparsefit.__file__).parent / "assets"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NEEDED = {kind: missing_for(kind) for kind in LIBRARIES}


def needs(kind):
    return pytest.mark.skipif(bool(NEEDED[kind]), reason=NEEDED[kind])


FORMATS = [pytest.param(kind, marks=needs(kind)) for kind in NEEDED]


@cache
def tokenizer():
    """One of few entries, which gguf reads one by one."""
    return load_tokenizer("tiny-llama").train_new_from_iterator(["the quick brown fox jumps over the lazy dog"], 300)


def pruned_run(model, folder, batch=None):
    """A run folder with a model at 50%, its masks, and a tokenizer."""
    torch.manual_seed(0)
    for parameter in model.parameters():  # wide weights: every layer matters
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else parameter.data.add_(0.1)
    masks = prune(model.eval(), [batch or {"input_ids": torch.arange(3, 15).view(2, 6)}]).masks
    export_base(model, masks, folder / "base").save(folder / "masks.safetensors")
    tokenizer().save_pretrained(folder / "base")
    return folder


def small_llama(**changes):
    size = len(tokenizer())
    return LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=2, **(SIZES | changes)))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_language_model_is_written_checked_and_counted(kind, sparsefit, tmp_path):
    run = pruned_run(small_llama(num_hidden_layers=1), tmp_path / "run")
    status, output, errors = sparsefit("export", run, "--format", kind, "--output", tmp_path / "out")
    assert status == 0, errors
    counted = inspect_folder(run)
    zeros, weights = (sum(getattr(matrix, what) for matrix in counted.pruned) for what in ("zeros", "weights"))
    assert f"zeros: {zeros:,} of {weights:,} pruned weights" in output
    assert float(re.search(r"largest difference (\S+) of the largest logit", output)[1]) < 1e-4
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "SHA256SUMS"} <= files
    assert not any(name.endswith(".safetensors") for name in files)


@needs("gguf")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_reads_the_gguf_file_as_the_same_model(sparsefit, tmp_path, dtype):
    run = pruned_run(small_llama(tie_word_embeddings=True).to(getattr(torch, dtype)), tmp_path / "run")
    assert sparsefit("export", run, "--format", "gguf", "--output", tmp_path / "out")[0] == 0
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)(ids).logits
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
        assert torch.equal(read(ids).logits, expected)
    assert load_tokenizer(str(tmp_path / "out/model.gguf")).get_vocab() == tokenizer().get_vocab()
    assert sparsefit("inspect", tmp_path / "out/model.gguf")[0] == 0


@needs("gguf")
def test_a_model_whose_heads_are_not_turned_is_written_as_gguf_too(sparsefit, tmp_path):
    size = len(tokenizer())
    config = Qwen3Config(vocab_size=size, num_key_value_heads=2, head_dim=128, tie_word_embeddings=False, **SIZES)
    run = pruned_run(Qwen3ForCausalLM(config), tmp_path / "run")
    status, output, errors = sparsefit("export", run, "--format", "gguf", "--output", tmp_path / "out")
    assert (status, "largest difference 0.0e+00" in output) == (0, True), errors


@needs("onnx")
def test_a_half_precision_model_is_written_in_float32_and_onnx_runtime_alone_runs_it(sparsefit, tmp_path):
    import onnxruntime

    run = pruned_run(small_llama(num_hidden_layers=1).bfloat16(), tmp_path / "run")
    status, output, errors = sparsefit("export", run, "--format", "onnx", "--output", tmp_path / "out")
    assert status == 0, errors
    assert "written in float32: the model is torch.bfloat16" in output
    for file in (tmp_path / "out").glob("*.onnx"):
        assert b"site-packages" not in file.read_bytes()  # no paths of this machine
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    ids = np.arange(3, 13, dtype=np.int64).reshape(1, 10)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(10)[None]}
    caches = [entry.name for entry in session.get_inputs() if entry.name not in feed]
    feed |= {name: np.zeros((1, 2, 0, 8), np.float32) for name in caches}
    (logits,) = session.run(["logits"], feed)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
        expected = model(torch.from_numpy(ids)).logits
    assert np.abs(logits - expected.numpy()).max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in ("onnx", "openvino")])
def test_an_image_classifier_is_written(kind, sparsefit, tmp_path):
    model = ViT(ViTConfig(image_size=16, patch_size=8, num_labels=3, **(SIZES | {"num_hidden_layers": 1})))
    run = pruned_run(model, tmp_path / "run", {"pixel_values": torch.randn(4, 3, 16, 16)})
    status, output, errors = sparsefit("export", run, "--format", kind, "--output", tmp_path / "out")
    assert (status, "pruned weights, counted in the file" in output) == (0, True), errors


@needs("gguf")
def test_what_gguf_cannot_store_is_reported_before_anything_is_written(sparsefit, tmp_path):
    model = ViT(ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZES))
    run = pruned_run(model, tmp_path / "run", {"pixel_values": torch.randn(4, 3, 16, 16)})
    status, _, errors = sparsefit("export", run, "--format", "gguf", "--output", tmp_path / "out")
    assert (status, "ViTForImageClassification is not written as GGUF" in errors) == (2, True), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_missing_library_is_named_with_its_extra(kind, sparsefit, tmp_path, monkeypatch):
    run = pruned_run(small_llama(), tmp_path / "run")
    monkeypatch.setattr("sparsefit.extras.has", lambda library: False)
    status, _, errors = sparsefit("export", run, "--format", kind, "--output", tmp_path / "out")
    assert (status, f"pip install 'sparsefit[{kind}]'" in errors) == (2, True), errors
    assert not (tmp_path / "out").exists()


@needs("gguf")
def test_a_file_that_lost_a_zero_is_not_written(sparsefit, tmp_path, monkeypatch):
    from sparsefit.serving import gguf_file

    run = pruned_run(small_llama(), tmp_path / "run")
    as_stored = gguf_file._as_stored
    spoiled = lambda name, weight, config: as_stored(name, weight, config) + ("layers.1.mlp" in name) * 1e-3  # noqa: E731
    monkeypatch.setattr(gguf_file, "_as_stored", spoiled)
    status, _, errors = sparsefit("export", run, "--format", "gguf", "--output", tmp_path / "out")
    assert (status, "ExportError" in errors, "layers.1.mlp" in errors) == (2, True, True), errors
    assert not (tmp_path / "out").exists()


@needs("gguf")
def test_a_file_that_computes_something_else_is_not_written(sparsefit, tmp_path, monkeypatch):
    from sparsefit.serving import gguf_file

    run = pruned_run(small_llama(), tmp_path / "run")
    monkeypatch.setattr(gguf_file, "_as_stored", lambda name, weight, config: weight.detach())  # heads not turned
    status, _, errors = sparsefit("export", run, "--format", "gguf", "--output", tmp_path / "out")
    assert (status, "does not compute what the model does" in errors) == (2, True), errors
    assert not (tmp_path / "out").exists()


@needs("gguf")
def test_a_float64_model_is_refused(sparsefit, tmp_path):
    run = pruned_run(small_llama().double(), tmp_path / "run")
    status, _, errors = sparsefit("export", run, "--format", "gguf", "--output", tmp_path / "out")
    assert (status, "float64" in errors) == (2, True), errors
    assert not (tmp_path / "out").exists()


def test_inputs_of_models_to_be_traced():
    with pytest.raises(ConfigError, match="BertModel has no head"):
        sample_inputs(BertModel(BertConfig(vocab_size=20, **SIZES)))
    classifier = ViT(ViTConfig(image_size=(16, 24), patch_size=8, **SIZES))
    assert sample_inputs(classifier)["pixel_values"].shape == (2, 3, 16, 24)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(expression):
    parts = [{"type": "Split", "pattern": {"Regex": expression}}, BYTES]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}


@pytest.mark.parametrize(
    ("saved", "name"),
    [
        ({"pre_tokenizer": BYTES | {"use_regex": True}}, "gpt-2"),
        (split_by(WORDS + r"|\p{N}{1,3}|" + REST), "llama-bpe"),
        (split_by(WORDS + r"|\p{N}|" + REST), "qwen2"),
        (split_by(TEKKEN), "tekken"),
        (split_by(WORDS + r"|\p{N}{1,2}|" + REST), None),
        ({"pre_tokenizer": None}, None),
        ({"pre_tokenizer": BYTES}, None),
    ],
)
def test_splitting_rules_are_named_or_refused(saved, name):
    if name is None:
        with pytest.raises(ConfigError, match="rule for splitting text is not one that can be written to GGUF"):
            pre_tokenizer(saved)
    else:
        assert pre_tokenizer(saved) == name
    assert pre_tokenizer(json.loads((ASSETS / "tiny_llama/tokenizer.json").read_text())) == "smollm"
