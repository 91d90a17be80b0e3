"""The pruned model with random weights for zeros: as fast as the model before pruning."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsefit.pruning import MaskSet

_LEAST_SPARSITY = 0.01
"""A matrix with a smaller share of zeros counts as dense: a few zeros occur in any matrix."""


def dense_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model in which random weights, as large as the others of their matrix, replace the zeros.

    Speed does not depend on the values of nonzero weights, so the twin is as fast as the model before pruning, which is
    not needed.

    >>> layer = nn.Linear(4, 4)
    >>> _ = layer.weight.data.triu_()
    >>> int((dense_twin(layer).weight == 0).sum())
    0
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for number, weight in enumerate(twin.parameters()):
            zero = weight == 0
            if weight.ndim < 2 or not zero.any():
                continue
            spread = weight[~zero].float().std() if (~zero).sum() > 1 else torch.tensor(0.02)
            generator = torch.Generator().manual_seed(seed + number)
            drawn = torch.randn(int(zero.sum()), generator=generator)
            drawn = torch.where(drawn.abs() < 1e-3, 1e-3, drawn)  # so that none is rounded to zero
            weight[zero] = (drawn * spread.cpu()).to(weight.device, weight.dtype)
    return twin


def zeros_as_masks(model: nn.Module) -> MaskSet:
    """Masks of the sparse linear layers of a model that was saved without masks."""
    masks = MaskSet()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and (layer.weight == 0).float().mean() >= _LEAST_SPARSITY:
            transposed = isinstance(layer, Conv1D)
            mask = layer.weight.detach() != 0
            masks.add(f"{name}.weight", mask.t() if transposed else mask, transposed)
    return masks
