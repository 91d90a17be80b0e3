from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsefit import MaskSet, prune
from sparsefit.errors import MaskError
from sparsefit.modules.loading import load_tokenizer
from sparsefit.recovery.adapter_files import export_adapter
from sparsefit.recovery.export import export_base, trains_base

IDS = torch.arange(3, 15).view(2, 6)


class Holder(nn.Module):
    """A module around a model, as a LightningModule is."""

    def __init__(self, model, depth=1) -> None:
        super().__init__()
        self.inner = model if depth == 1 else Holder(model, depth - 1)
        self.other = nn.Linear(2, 2)


def lora(model, **settings):
    settings = {"target_modules": "all-linear", "r": 2, "init_lora_weights": False} | settings
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("opt", {})],
)
def test_the_files_alone_give_the_model_back(tmp_path, tiny_model, architecture, changes, adapted, depth):
    model = tiny_model(architecture, **changes)
    masks = prune(model, [{"input_ids": IDS}]).masks
    sparse = logits(model)
    model = lora(model, fan_in_fan_out=architecture == "gpt2") if adapted else model
    module = Holder(model, depth) if depth else model
    prefix = "inner." * depth
    saved = export_base(module, masks.renamed(lambda name: prefix + name), tmp_path / "base")
    assert (
        export_adapter(module, masks.renamed(lambda name: prefix + name), tmp_path / "base", tmp_path / "adapter")
        == adapted
    )

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(base), sparse)
    assert saved.digest() == masks.digest()
    saved.verify(base)
    tensors = load_file(tmp_path / "base/model.safetensors")
    saved.verify(tensors)
    assert not any("lora" in name or "base_layer" in name or "other" in name for name in tensors)
    assert base.config.tie_word_embeddings == model.config.tie_word_embeddings
    if adapted:
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))
        assert not torch.equal(logits(again), sparse)
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str((tmp_path / "base").resolve())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(tmp_path, tiny_model, dtype):
    model = tiny_model("llama").to(dtype)
    masks = prune(model, [{"input_ids": IDS}]).masks
    export_base(lora(model), masks, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    masks.verify(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))


def test_a_plain_module_is_one_file_of_its_state(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.append(model[0])  # its tensors stand in the state twice
    masks = prune(model, [torch.randn(9, 4)]).masks
    assert export_base(model, masks, tmp_path / "new" / "base") is masks
    tensors = load_file(tmp_path / "new/base/model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


def test_a_plain_module_with_adapters(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    masks = prune(model, [torch.randn(9, 4)]).masks
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    export_base(Holder(wrapped), masks.renamed(lambda name: f"inner.{name}"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensors[f"inner.{name}"], value) for name, value in state.items())
    assert tensors.keys() == {f"inner.{name}" for name in state} | {"other.weight", "other.bias"}


def test_a_weight_that_came_back_is_not_written(tmp_path, tiny_model):
    model = tiny_model("llama")
    masks = prune(model, [{"input_ids": IDS}]).masks
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(MaskError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        export_base(model, masks, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_the_tokenizer_goes_along(tmp_path, tiny_model):
    module = Holder(tiny_model("llama"))
    module.tokenizer = load_tokenizer("tiny-llama")
    masks = prune(module.inner, [{"input_ids": IDS}]).masks.renamed(lambda name: f"inner.{name}")
    export_base(module, masks, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a b").input_ids == module.tokenizer("a b").input_ids


def test_whether_the_base_trains(tiny_model):
    model = Holder(lora(tiny_model("llama")))
    model.other.requires_grad_(False)
    assert not trains_base(model)
    model.inner.base_model.model.model.norm.weight.requires_grad_(True)
    assert trains_base(model)


def test_a_layer_that_peft_trains_a_copy_of_is_exported_as_it_was(tmp_path, tiny_model):
    base = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = lora(base, target_modules=["q_proj"], modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    export_base(model, MaskSet(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
