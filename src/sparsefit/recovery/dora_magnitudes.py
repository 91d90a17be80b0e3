"""Rescales DoRA's magnitudes while the base under the adapter is pruned.

DoRA computes with m (W + s B A) / ||W + s B A||, row by row, and is initialized with m = ||W|| (Liu et al. 2024, arXiv
2402.09353). With the norms of the dense W, every pruned row would be scaled up to its dense norm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.recovery.gather_shards import own_part, whole
from sparsefit.sharded import shard_of


@contextmanager
def magnitudes_follow(model: nn.Module) -> Iterator[None]:
    """Keep the ratio m / ||W + s B A|| of DoRA adapters constant while their base is pruned.

    An untrained adapter still changes nothing afterwards, and its magnitudes are bitwise those of an adapter created on
    the pruned base. If an error occurs, the old magnitudes are restored.

    Args:
        model: A LightningModule or model, dense, with or without such adapters.
    """
    found = [(layer, name) for layer in model.modules() for name in getattr(layer, "lora_magnitude_vector", None) or ()]
    found = [(layer, name) for layer, name in found if name in layer.lora_A]  # without embeddings
    before, gains = [], []
    with ExitStack() as hooks, torch.no_grad():
        for layer, name in found:
            with whole(layer):
                before.append(layer.lora_magnitude_vector[name].weight.detach().clone())
                gains.append(before[-1] / _lengths(layer, name))
        for (layer, name), gain in zip(found, gains, strict=True):
            hook = layer.register_forward_pre_hook(partial(_follow, name=name, gain=gain))
            hooks.callback(hook.remove)
        try:
            yield
        except BaseException:
            for (layer, name), old in zip(found, before, strict=True):
                magnitudes = layer.lora_magnitude_vector[name].weight
                shard_of(magnitudes).copy_(own_part(old, magnitudes))
            raise
        for (layer, name), gain in zip(found, gains, strict=True):
            with whole(layer):
                _follow(layer, name=name, gain=gain)


@torch.no_grad()
def _follow(layer: nn.Module, *_: Any, name: str, gain: Tensor) -> None:
    layer.lora_magnitude_vector[name].weight.copy_(gain * _lengths(layer, name))


def _lengths(layer: nn.Module, name: str) -> Tensor:
    """||W + s B A|| for the current weights, computed by PEFT as at initialization."""
    start = copy.deepcopy(layer.lora_magnitude_vector[name])
    start.update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[name].weight,
        lora_B=layer.lora_B[name].weight,
        scaling=layer.scaling[name],
    )
    return start.weight.detach().to(layer.lora_magnitude_vector[name].weight)
