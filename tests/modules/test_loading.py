from __future__ import annotations

import shutil
import time
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file

from sparsefit.errors import ConfigError
from sparsefit.modules.loading import load_causal_lm, load_tokenizer

TINY = files("sparsefit") / "assets" / "tiny_llama"


def test_the_package_brings_a_model():
    if not (TINY / "model.safetensors").is_file():
        pytest.skip("the package's model is not installed")
    model, tokenizer = load_causal_lm("tiny-llama"), load_tokenizer("tiny-llama")
    ids = tokenizer("Return the number of items.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.shape == (*ids.shape, model.config.vocab_size)
    assert not model.training


def test_a_folder_of_a_real_model(shared_data):
    folder = str(shared_data / "tinystories656K")
    tokenizer = load_tokenizer(folder)
    text = "Once upon a time there was a big red ball."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    for dtype in ("float32", "bfloat16"):
        model = load_causal_lm(folder, dtype, attn_implementation="eager")
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        assert model.config._attn_implementation == "eager"
    assert load_causal_lm(folder, "auto").dtype == torch.float32


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_missing_folder_is_reported_with_its_nearest_neighbour(tmp_path, load):
    (tmp_path / "tiny-stories").mkdir()
    with pytest.raises(ConfigError, match=r"no folder .*tiny-storys.*Did you mean .*/tiny-stories\?"):
        load(str(tmp_path / "tiny-storys"))
    with pytest.raises(ConfigError, match=r"no folder .*/tinystories/model.*Did you mean .*/tiny-stories\?"):
        load(str(tmp_path / "tinystories" / "model"))


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_folder_without_a_model(tmp_path, load):
    with pytest.raises(ConfigError, match=r"holds no .*config\.json"):
        load(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        load(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="name is empty"):
        load("")


def test_a_damaged_model_is_named(shared_data, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(shared_data / "tinystories656K", folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").chmod(0o644)
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ConfigError, match=r"cannot load the model in .*/model: "):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_an_unreachable_hub_is_reported_at_once(monkeypatch, load, name):
    monkeypatch.setattr("sparsefit.modules.loading.hub_problem", lambda: "it cannot be reached")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"'{name}'.*it cannot be reached.*hf download {name} --local-dir"):
        load(name)
    assert time.monotonic() - start < 10


def test_a_hub_name_near_a_local_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("sparsefit.modules.loading.hub_problem", lambda: "it cannot be reached")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinystories656K").mkdir()
    with pytest.raises(ConfigError, match=r"Did you mean tinystories656K\?"):
        load_tokenizer("tinystories656k")


def test_an_unknown_dtype():
    with pytest.raises(ConfigError, match="unknown dtype 'float31'"):
        load_causal_lm("tiny-llama", "float31")


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_cached_hub_model_loads_without_the_hub(monkeypatch, shared_data, tmp_path, load):
    from huggingface_hub import constants

    cached = tmp_path / "models--nobody--stories"
    shutil.copytree(shared_data / "tinystories656K", cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("sparsefit.modules.loading.hub_problem", lambda: "it cannot be reached")
    loaded, source = load("nobody/stories"), load(str(shared_data / "tinystories656K"))
    if load is load_tokenizer:
        assert loaded.get_vocab() == source.get_vocab()
    else:
        weights = load_file(shared_data / "tinystories656K/model.safetensors")
        assert weights.keys() <= loaded.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())
