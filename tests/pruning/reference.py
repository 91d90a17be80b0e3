"""Slow and plain versions of what the engine does, written from the published description alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal

import numpy as np
import torch
from torch import nn


def reference_mask(
    scores: np.ndarray, sparsity: float = 0.5, granularity: str = "output", pattern: str | None = None, size: int = 1
) -> np.ndarray:
    """True = kept. One comparison group after the other, each sorted by (score, row, column)."""
    kept = np.ones(scores.shape, dtype=bool)
    if pattern is not None:
        n, m = map(int, pattern.split(":"))
        groups = [[(i, j + k) for k in range(m)] for i in range(scores.shape[0]) for j in range(0, scores.shape[1], m)]
        counts = [m - n] * len(groups)
    else:
        groups = reference_groups(scores.shape, granularity, size)
        counts = [int(len(group) * Decimal(str(sparsity))) for group in groups]
    remove_smallest(kept, scores, groups, counts)
    return kept


def reference_groups(shape: tuple[int, int], granularity: str, size: int = 1) -> list[list[tuple[int, int]]]:
    """The (row, column) places of each comparison group, in row-major order."""
    number = {
        "output": lambda i, j: i // size,
        "input": lambda i, j: j // size,
        "layer": lambda i, j: 0,
    }[granularity]
    groups: dict[int, list[tuple[int, int]]] = {}
    for i in range(shape[0]):
        for j in range(shape[1]):
            groups.setdefault(number(i, j), []).append((i, j))
    return [groups[key] for key in sorted(groups)]


def remove_smallest(kept: np.ndarray, scores: np.ndarray, groups: list[list[tuple[int, int]]], counts: list[int]):
    for group, count in zip(groups, counts, strict=True):
        for place in sorted(group, key=lambda place: (scores[place], place))[:count]:
            kept[place] = False


def reference_scores(weight: np.ndarray, squared_norm: np.ndarray | None) -> np.ndarray:
    """Magnitude without the (in,) squared norms, Wanda with them; all in float32."""
    scores = np.abs(weight.astype(np.float32))
    return scores if squared_norm is None else scores * np.sqrt(squared_norm.astype(np.float32))


def linear_layers(model: nn.Module, prefixes: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers whose names start with one of the prefixes."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(name.startswith(f"{p}.") for p in prefixes)
    }


@torch.no_grad()
def reference_prune(
    model: nn.Module, samples: list[Mapping], stages: list[list[str]], **selection
) -> dict[str, np.ndarray]:
    """Wanda by running the whole model from its start, one sample at a time, once for each stage.

    Args:
        model: In evaluation mode; pruned in place.
        samples: Each a mapping of batch size 1 without padding.
        stages: Names of the modules that are pruned together from the same passes: one block after the other
            for the paper's order, all at once for the statistics of the dense model.
        selection: Of `reference_mask`.

    Returns:
        Masks by parameter name, (out, in).
    """
    masks = {}
    for prefixes in stages:
        layers = linear_layers(model, prefixes)
        norms = squared_input_norms(model, samples, layers)
        for name, layer in layers.items():
            transposed = type(layer).__name__ == "Conv1D"
            weight = layer.weight.t() if transposed else layer.weight
            mask = reference_mask(reference_scores(weight.numpy(), norms[name]), **selection)
            masks[f"{name}.weight"] = mask
            layer.weight.mul_(torch.from_numpy(mask.T if transposed else mask))
    return masks


@torch.no_grad()
def squared_input_norms(
    model: nn.Module, samples: list[Mapping], layers: Mapping[str, nn.Module]
) -> dict[str, np.ndarray]:
    norms: dict[str, torch.Tensor] = {}

    def hook(name):
        def record(layer, args):
            tokens = args[0].reshape(-1, args[0].shape[-1]).float()
            norms[name] = norms.get(name, 0) + tokens.square().sum(dim=0)

        return record

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    for sample in samples:
        model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: norm.numpy() for name, norm in norms.items()}
