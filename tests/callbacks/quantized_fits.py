"""Small fits whose base is quantized."""

from __future__ import annotations

import pytest
import torch
from small_runs import fit, text
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefit.callbacks import WandaPruning
from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.modules import CausalLMModule
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.quantize import quantized_weights

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized base")


HELD = [{"kind": "nf4"}, {"kind": "nf4", "double_quant": True}, {"kind": "int8"}]
NAMES = ["nf4", "nf4-double", "int8"]


def module(form="masked_lora", seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    adapter = AdapterSettings(form, r=2, target_modules=["q_proj", "down_proj"], dropout=0.0)
    return CausalLMModule(model, adapter, learning_rate=0.02, **settings)


def train(model, *callbacks, steps=4, **settings):
    torch.manual_seed(0)
    return fit(model, text(4), *callbacks, max_steps=steps, **settings)  # 2 steps an epoch


def callbacks(order="after", **held):
    pair = [WandaPruning(), QuantizedBase(**held)]
    return pair if order == "after" else pair[::-1]


def held_layers(model):
    return dict(quantized_weights(model))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing
