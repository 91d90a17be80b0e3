"""Small pruned models whose base is quantized."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefit import PruningConfig, prune
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapters import attach_adapter, bind_masks
from sparsefit.recovery.quantize import (
    quantized_weights,
)

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized base")


KINDS = [("nf4", False), ("nf4", True), ("int8", False)]
MASKED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# The default block of 64 divides some widths of these and not others; odd ones make the weights odd in number.
WIDTHS = [(64, 128), (48, 80), (32, 27)]


def pruned_llama(hidden=64, inner=128, dtype=torch.float32, bias=False, sparsity=0.5, settings=None, **pruning):
    """A pruned Llama with random weights of a usual size, with adapters of the settings, and its masks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=50, tie_word_embeddings=False, attention_bias=bias, mlp_bias=bias, **sizes)
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                rows = torch.linspace(-2, 1, len(parameter)).exp().unsqueeze(1)
                parameter.copy_(torch.randn(parameter.shape) * 0.1 * rows)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.requires_grad_(False)
    if settings is not None:
        model = attach_adapter(model, settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, 0, 0.1)
    masks = prune(model, [tokens()], PruningConfig(sparsity=sparsity, **pruning)).masks
    bind_masks(model, masks)
    return model, masks


def mask_set(masks):
    made = MaskSet()
    for name, mask in masks.items():
        made.add(name, mask)
    return made


def tokens(rows=4, length=12, seed=1):
    return {"input_ids": torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))}


def logits(model):
    with torch.no_grad():
        return model(**tokens()).logits


def layers_of(model):
    return dict(quantized_weights(model))


def assert_same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
