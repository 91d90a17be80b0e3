"""The kinds of layers that are pruned, one file each: their weights as matrices, and where their inputs are seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from sparsefit.pruning.layers import attention, convolution, experts, linear, quantized, recurrent
from sparsefit.pruning.layers.base import Handler, PrunableWeight
from sparsefit.pruning.layers.sharded import as_sharded

KINDS = (linear, quantized, convolution, recurrent, attention, experts)

PRODUCTS: dict[Callable[..., Any], Handler] = {
    function: handler for kind in KINDS for function, handler in getattr(kind, "PRODUCTS", {}).items()
}
"""For each torch function that computes with weights, the handler that records their inputs."""


def matrices_of(module: nn.Module, name: str = "") -> list[PrunableWeight]:
    """The weights of a module itself (not of its children) that multiply its inputs, named as in the bare model.

    >>> [(weight.name, weight.shape) for weight in matrices_of(nn.Linear(3, 5), "fc")]
    [('fc.weight', (5, 3))]
    """
    prefix = f"{name}." if name else ""
    weights = [as_sharded(weight) for kind in KINDS for weight in kind.matrices(module)]
    return [replace(weight, name=prefix + weight.name) for weight in weights]


def reason_left_dense(module: nn.Module) -> str:
    """Why the weights of a module cannot be pruned.

    >>> reason_left_dense(nn.Conv2d(8, 8, 3, groups=8))
    'depthwise convolution'
    """
    if isinstance(module, nn.Embedding):
        return "embedding"
    if convolution.is_depthwise(module):
        return "depthwise convolution"
    if isinstance(module, nn.LSTM) and module.proj_size:
        return "projection of an LSTM"
    return f"not a layer that is pruned: {type(module).__name__}"
