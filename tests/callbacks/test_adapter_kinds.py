"""Runs with adapters of several kinds: the files are the model in memory, and the merged model has every zero."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_runs import LanguageModel, fit, text
from transformers import AutoModelForCausalLM

from sparsefit.callbacks import RunReport, WandaPruning
from sparsefit.errors import ConfigError
from sparsefit.pruning import MaskSet

LOW = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
IA3 = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": ("LoraConfig", LOW, False),
    "dora": ("LoraConfig", LOW | {"use_dora": True}, False),
    "pissa": ("LoraConfig", LOW | {"init_lora_weights": "pissa"}, False),
    "tokens": ("LoraConfig", LOW | {"trainable_token_indices": [4, 5]}, False),
    "oft": ("OFTConfig", {"oft_block_size": 4, "target_modules": ["q_proj"]}, False),
    "shira": ("ShiraConfig", {"r": 2, "target_modules": ["q_proj"], "random_seed": 1}, False),
    "prompt": ("PromptTuningConfig", PROMPT, False),
    "ia3": ("IA3Config", IA3, True),
    "hira": ("HiraConfig", LOW, True),
    "norms": ("LNTuningConfig", {"target_modules": ["norm", "input_layernorm"], "task_type": "CAUSAL_LM"}, True),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=next(iter(text(4, seed=2)))["input_ids"]).logits


def adapted(tiny_model, kind, **settings):
    torch.manual_seed(0)
    return LanguageModel(peft.get_peft_model(tiny_model("llama"), getattr(peft, kind)(**settings)))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_files_are_the_model_and_a_merged_one_has_every_zero(tmp_path, tiny_model, name):
    kind, settings, merges = KINDS[name]
    module, folder = adapted(tiny_model, kind, **settings), tmp_path / "run"
    start = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    fit(module, text(8), WandaPruning(), RunReport(str(folder)), max_epochs=2)
    assert any(not torch.equal(start[name], p) for name, p in module.named_parameters() if name in start)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    masks = MaskSet.load(folder / "masks.safetensors")
    masks.verify(base)
    assert len(masks) == 21
    expected = logits(module.model)
    again = peft.PeftModel.from_pretrained(base, folder / "adapter")
    assert float((logits(again) - expected).abs().max()) == 0.0

    merge = json.loads((folder / "report.json").read_text())["merge"]
    assert merge["lossless"] is merges
    assert (folder / "model").is_dir() is merges
    if not merges:
        assert merge["reason"]
        return
    tensors = load_file(folder / "model/model.safetensors")
    masks.verify(tensors)
    zeros = sum(int((tensors[name][~masks[name]] == 0).sum()) for name in masks)
    assert zeros == sum(pruned for _, pruned in masks.counts().values()) > 0
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder / "base")), expected, atol=1e-3)


def test_a_tuner_that_would_not_come_back_is_refused_before_anything_is_spent(tmp_path, tiny_model):
    class Watch(RunReport):
        def on_pruning_start(self, *args):
            pytest.fail("the dense model is evaluated")

    module = adapted(tiny_model, "OSFConfig", effective_rank=2, target_modules=["q_proj"])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ConfigError, match=r"PEFT's OSF .* Prune it first"):
        fit(module, text(8), Watch(str(tmp_path / "run")), WandaPruning())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
