"""Pruned 2:4 layers as torch's semi-structured tensors, which GPUs since Ampere multiply at up to twice the speed.

torch.sparse (prototype) has two backends: cuSPARSELt, and CUTLASS where that is not built in. Both hold the two kept
values of every four and two bits for each: 9/16 of the memory of the dense weight in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from sparsefit.pruning import MaskSet
from sparsefit.pruning.naming import base_modules

HALF = (torch.float16, torch.bfloat16)
MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}
"""What the rows and columns of a half-precision weight must be multiples of, for each backend."""

_AMPERE, _HOPPER = (8, 0), (9, 0)
_TRIAL = 64  # rows and columns that fit both backends


@dataclass(frozen=True)
class SemiStructuredReport:
    """What became of the masked weights.

    Attributes:
        backend: What multiplies the converted ones: "cusparselt" or "cutlass"; None if nothing can.
        converted: Names of the weights that are semi-structured tensors now.
        dense: The other masks, and why their weights stayed as they were.
    """

    backend: str | None
    converted: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)


def to_semi_structured(model: nn.Module, masks: MaskSet) -> SemiStructuredReport:
    """Replace the weights of 2:4 pruned linear layers by `torch.sparse.to_sparse_semi_structured` tensors, in place.

    For inference on one GPU: the tensors cannot be trained, merged into, cast or moved, and `save_pretrained` cannot
    write them (save the model first). Inputs must have the dtype of the weights.

    Args:
        model: A pruned model on its GPU, in bfloat16 or float16; with or without PEFT's adapters.
        masks: Its masks.

    Returns:
        Which weights were converted, and why the others were not. Nothing is an error but masks that do not hold.

    Raises:
        MaskError: if the masks do not fit or a pruned weight is not zero; nothing is changed then.
    """
    masks.verify(model)
    layers = base_modules(model)
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    backends = {device: backend_of(device) for device in devices}
    used = next((backend for backend, _ in backends.values() if backend), None)
    report = SemiStructuredReport(used)
    shared: dict[int, nn.Parameter] = {}
    for name in masks:
        layer = layers.get(name.removesuffix(".weight"))
        backend, why = None, why_dense(name, layer, masks)
        if why is None:
            backend, why = backends.get(layer.weight.device) or (None, _no_gpu(layer.weight.device))
        if why is None:
            why = _misfit(layer.weight, backend)
        if why is not None:
            report.dense[name] = why
            continue
        dense = layer.weight
        if id(dense) not in shared:
            shared[id(dense)] = nn.Parameter(pack(dense.detach().contiguous(), backend), requires_grad=False)
        for other in _users(layers, dense):
            other.weight = shared[id(dense)]
        report.converted.append(name)
    return report
