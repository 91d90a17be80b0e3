"""Masked layers and models with adapters, with values as after some training."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsefit.recovery.adapters import AdapterSettings, attach_adapter

IN, OUT = 12, 10
IDS = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(0))


def random_adapters(model, scale=0.3):
    """Give adapters values as after some training, as B is zero at first."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)
    return model


def masked_layer(kind="linear", bias=True, dropout=0.0, dtype=torch.float32, r=4, width=(IN, OUT)):
    """A PEFT model of one masked layer, the layer, and its (out, in) mask."""
    torch.manual_seed(0)
    inputs, outputs = width
    base = nn.Linear(inputs, outputs, bias=bias) if kind == "linear" else Conv1D(outputs, inputs)
    if kind == "conv1d":
        nn.init.normal_(base.weight)
        nn.init.normal_(base.bias)
    mask = torch.rand(outputs, inputs) > 0.5
    with torch.no_grad():
        base.weight.mul_(mask if kind == "linear" else mask.T)
    settings = AdapterSettings("masked_lora", r=r, alpha=6, dropout=dropout, target_modules="0")
    model = random_adapters(attach_adapter(nn.Sequential(base).to(dtype), settings)).train()
    layer = model.base_model.model[0]
    layer.take_mask(mask)
    return model, layer, mask


def matrix(layer):
    weight = layer.base_layer.weight
    return weight.T if isinstance(layer.base_layer, Conv1D) else weight


def update(layer, mask, adapter="default"):
    """s M (.) (B A), by autograd."""
    return layer.scaling[adapter] * mask * (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight)
