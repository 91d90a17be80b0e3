"""A model whose weights are files is pruned as the same model in memory is, and only what is in use is in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import model_of, samples_of
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.modules.loading import load_causal_lm
from sparsefit.modules.streaming import stream_causal_lm
from sparsefit.pruning.mapped_weights import MappedWeights

METHODS = {
    "wanda": {},
    "2:4": {"pattern": "2:4"},
    "dense statistics": {"update": "none"},
    "dense statistics, Gram matrices": {"update": "none", "swaps": 3},
    "magnitude": {"score": "magnitude"},
    "ria in columns": {"score": "ria", "granularity": "input"},
    "owl": {"allocation": "owl"},
    "owl in one pass": {"allocation": "owl", "update": "none", "score": "wanda_l1"},
    "uniform": {"allocation": "uniform"},
    "swaps": {"swaps": 5},
    "SparseGPT": {"score": "sparsegpt", "reconstruction": "iterative"},
    "least squares": {"reconstruction": "least_squares"},
    "some targets": {"targets": ["q_proj", "mlp.down_proj", "lm_head"]},
    "computed on a device": {"device": "cpu"},
}
CONVERTED = ("Mixtral", "Qwen3-Next", "GPT-NeoX")  # experts one by one; other names


def saved(name, folder, **settings):
    model_of(name).save_pretrained(folder, **settings)
    return folder


def weights_in(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_pruned_alike(name, source, copy, config, dtype="float32"):
    """Prune a model in memory and in its files: masks, notes and all weights as they are loaded again are the same."""
    before = {file: file.read_bytes() for file in source.iterdir()}
    here = load_causal_lm(str(source), dtype)
    expected = prune(here, samples_of(name), config)
    copy.mkdir()
    model, weights = stream_causal_lm(str(source), copy, dtype)
    found = prune(model, samples_of(name), config, mapped=weights)
    weights.flush()
    assert found.masks.digest() == expected.masks.digest()
    assert (found.notes, found.left_dense, found.update) == (expected.notes, expected.left_dense, expected.update)
    assert found.overall_sparsity == expected.overall_sparsity
    again = load_causal_lm(str(copy), "auto")
    for own, other in zip(again.state_dict().items(), here.state_dict().items(), strict=True):
        assert own[0] == other[0]
        assert torch.equal(own[1], other[1]), own[0]
    found.masks.verify(weights_in(copy))
    assert before == {file: file.read_bytes() for file in source.iterdir()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama in several files with an index."""
    return saved("Llama", tmp_path_factory.mktemp("llama"), max_shard_size="20KB")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_masks_and_weights_of_the_model_in_memory(llama, tmp_path, method):
    assert len(list(llama.glob("*.safetensors"))) > 2
    assert_pruned_alike("Llama", llama, tmp_path / "copy", PruningConfig(**METHODS[method]))


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_the_copy_is_of_the_dtype_that_is_asked_for(llama, tmp_path, dtype):
    half = tmp_path / "half"
    load_causal_lm(str(llama), "float16").save_pretrained(half)
    assert_pruned_alike("Llama", half, tmp_path / "copy", PruningConfig(reconstruction="least_squares"), dtype)
    wanted = torch.float16 if dtype == "auto" else torch.bfloat16
    assert {tensor.dtype for tensor in weights_in(tmp_path / "copy").values()} == {wanted}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "Gemma 2", "Bloom", "Mamba", "GPT-OSS", "Llama 4", *CONVERTED])
def test_other_architectures(tmp_path, name):
    source = saved(name, tmp_path / "model")
    assert_pruned_alike(name, source, tmp_path / "copy", PruningConfig())
    assert not [left for left in (tmp_path / "copy").iterdir() if left.is_dir()]  # what a conversion needed is gone


def test_gradients_of_a_model_in_files_cannot_be_had(llama, tmp_path):
    model, weights = stream_causal_lm(str(llama), tmp_path)
    with pytest.raises(ConfigError, match="memory-mapped files: use allocation 'owl'"):
        prune(model, samples_of("Llama"), PruningConfig(allocation="fisher"), mapped=weights)


def test_tied_weights_stay_tied_under_either_name(tmp_path):
    source = tmp_path / "model"
    saved("Gemma", source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_pruned_alike("Gemma", source, tmp_path / "copy", PruningConfig())
    model, _ = stream_causal_lm(str(source), tmp_path / "copy")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_blocks_leave_memory_when_their_turn_is_over(tmp_path):
    """Counted in pages that the process has of each file, at every step of the pruning."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("only Linux tells what of a file is in memory")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path / "model")
    for settings in ({}, {"allocation": "owl"}, {"update": "none"}, {"swaps": 2, "update": "none"}):
        copy = tmp_path / "copy"
        copy.mkdir()
        model, weights = stream_causal_lm(str(tmp_path / "model"), copy)
        most = 0

        def look(done, total, copy=copy):
            nonlocal most
            held = {Path(file).name: size for file, size in _in_memory(copy).items() if size > 0}
            held.pop("model-00001-of-00005.safetensors", None)  # embeddings and head
            most = max(most, sum(held.values()))

        prune(model, samples_of("Llama"), PruningConfig(**settings), progress=look, mapped=weights)
        block = (copy / "model-00002-of-00005.safetensors").stat().st_size
        assert 0 < most < 2 * block, settings
        shutil.rmtree(copy)


def _in_memory(folder):
    """Bytes in the memory of this process of each file in a folder that is mapped."""
    found, file = {}, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        if "-" in parts[0]:
            file = parts[5] if len(parts) > 5 and parts[5].startswith(str(folder)) else None
        elif file is not None and parts[0] == "Rss:":
            found[file] = found.get(file, 0) + int(parts[1]) * 1024
    return found


class Elsewhere(nn.Module):
    """A block whose weights are in other memory as long as it is on the device that computes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.second(self.first(x).relu())

    def to(self, device):
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()
        return self


def test_a_block_that_was_computed_elsewhere_comes_back_to_its_file(tmp_path):
    model = nn.Sequential(*(Elsewhere() for _ in range(3)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    expected = prune(model, [torch.ones(4, 8)])
    weights = MappedWeights([tmp_path / "model.safetensors"])
    streamed = nn.Sequential(*(Elsewhere() for _ in range(3)))
    streamed.load_state_dict(weights.tensors, assign=True)
    found = prune(streamed, [torch.ones(4, 8)], PruningConfig(device="cpu"), mapped=weights)
    assert found.masks.digest() == expected.masks.digest()
    weights.flush()
    found.masks.verify(load_file(tmp_path / "model.safetensors"))


def test_what_is_let_go_is_not_lost(tmp_path):
    save_file({"a": torch.zeros(3, 5), "b": torch.ones(2000, dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    weights = MappedWeights([tmp_path / "one.safetensors"])
    weights.tensors["a"].fill_(2.0)
    weights.let_go([*weights.tensors.values(), torch.zeros(3)])
    assert weights.tensors["a"].eq(2).all()
    weights.flush()
    assert load_file(tmp_path / "one.safetensors")["a"].eq(2).all()
    assert load_file(tmp_path / "one.safetensors")["b"].eq(1).all()


def damage(folder, kind):
    config, file = folder / "config.json", folder / "model.safetensors"
    tensors = load_file(file)
    if kind == "a weight is missing":
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, file, metadata={"format": "pt"})
    elif kind == "a weight has another shape":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
        save_file(tensors, file, metadata={"format": "pt"})
    elif kind == "quantized":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"bits": 4}}))
    elif kind == "no safetensors":
        file.rename(folder / "pytorch_model.bin")
    elif kind == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "no folder":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("kind", "error", "reported"),
    [
        ("a weight is missing", ConfigError, r"model.layers.1.mlp.up_proj"),
        ("a weight has another shape", ConfigError, r"up_proj.weight is \(3, 4\), and \(48, 32\)"),
        ("quantized", ConfigError, "quantized"),
        ("no safetensors", RunFolderError, "no model.safetensors"),
        ("cut off", RunFolderError, "cannot be read"),
        ("no folder", ConfigError, "no local folder"),
    ],
)
def test_what_cannot_be_streamed_is_reported_before_anything_is_written(tmp_path, kind, error, reported):
    source = saved("Llama", tmp_path / "model")
    damage(source, kind)
    (tmp_path / "copy").mkdir()
    with pytest.raises(error, match=reported):
        stream_causal_lm(str(source), tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_a_disk_without_room_is_reported_first(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunFolderError, match="Free some space"):
        stream_causal_lm(str(llama), tmp_path)
    assert not list(tmp_path.iterdir())
