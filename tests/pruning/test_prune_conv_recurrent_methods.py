"""Reconstruction, SparseGPT and swaps on convolutions and recurrent layers, against the pure functions on their Gram
matrices."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conv_recurrent_networks import network, one_thread, signals  # noqa: F401
from passes import spread_weights
from torch import Tensor, nn
from unfolded import by_groups, gathered, matrix_of, side_by_side

from sparsefit import PruningConfig, prune
from sparsefit.pruning.least_squares import least_squares
from sparsefit.pruning.refinement import swap
from sparsefit.pruning.selection import Granularity, select, select_n_of_m
from sparsefit.pruning.weight_updates import inverse_factor, prune_iteratively, update_sequentially


def one_layer(kind: str) -> tuple[nn.Module, Any]:
    make = {
        "convolution": lambda: (nn.Conv2d(8, 6, 3, padding=1), signals(5, 8, 6, 6)),
        "groups": lambda: (nn.Conv2d(16, 8, (2, 3), groups=2, stride=(1, 2)), signals(6, 16, 7, 7)),
        "line": lambda: (nn.Conv1d(20, 6, 7, stride=2), signals(6, 20, 64)),  # 140 columns: two blocks of SparseGPT
        "one point": lambda: (nn.Conv2d(8, 6, 1), signals(5, 8, 4, 4)),
        "lstm": lambda: (nn.LSTM(8, 8, num_layers=2, bidirectional=True), signals(12, 5, 8)),
        "gru": lambda: (nn.GRU(8, 12, batch_first=True), signals(5, 12, 8)),
    }
    layer, data = make[kind]()
    return spread_weights(nn.Sequential(layer)), data


METHODS = {
    "sequential": {"reconstruction": "sequential"},
    "least_squares": {"reconstruction": "least_squares"},
    "iterative": {"reconstruction": "iterative", "score": "sparsegpt"},
    "iterative per output": {"reconstruction": "iterative", "score": "wanda", "granularity": "output"},
    "swaps": {"swaps": 3},
    "swaps, sequential": {"swaps": 2, "reconstruction": "sequential"},
}


def method_by_hand(dense: Tensor, tokens: Tensor, order: np.ndarray, config: PruningConfig) -> tuple[Tensor, Tensor]:
    """The mask and the new values of the rows that multiply some (tokens, in), by the pure functions."""
    dense, tokens = dense[:, order], tokens[:, order].float()
    gram, structure, granularity = tokens.t() @ tokens, config.structure, Granularity.parse(config.granularity)
    factor = inverse_factor(gram, config.damping)

    def choose(weights: Tensor, columns: slice, diagonal: Tensor) -> Tensor:
        if config.score == "sparsegpt":
            scores = (weights / diagonal) ** 2
        else:
            scores = weights.abs() * gram.diagonal()[columns].sqrt()
        if structure:
            return select_n_of_m(scores, structure.n, structure.m)
        return select(scores, granularity, config.exact_sparsity)

    if config.reconstruction == "iterative":
        mask, values = prune_iteratively(dense, factor, choose, group=structure.m if structure else None)
    else:
        mask = choose(dense, slice(None), factor.upper.diagonal())
        if config.swaps:
            mask = swap(dense, mask, gram, config.swaps, (structure.n, structure.m) if structure else None)
        values = dense.masked_fill(~mask, 0)
        if config.reconstruction == "sequential":
            values = update_sequentially(dense, mask, factor)
        elif config.reconstruction == "least_squares":
            values, _ = least_squares(dense, mask, gram, config.damping)
    back = np.argsort(order)
    return mask[:, back], values[:, back]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", ["convolution", "groups", "line", "one point", "lstm", "gru"])
def test_methods_with_gram_matrices(kind, method, pattern):
    model, data = one_layer(kind)
    dense, config = copy.deepcopy(model), PruningConfig(update="none", pattern=pattern, **method)
    result = prune(model, [data], config, forward=lambda batch: model(data))
    inputs = gathered(dense, [data])
    assert sorted(result.masks) == sorted(name for name, p in dense.named_parameters() if p.ndim > 1)
    for name, mask in result.masks.items():
        parameter, matrix = dense.get_parameter(name), matrix_of(dense, name)
        order = side_by_side(parameter) if pattern and parameter.ndim > 2 else np.arange(matrix.shape[1])
        error = norm = 0.0
        for rows, tokens in by_groups(matrix, inputs[name]):
            kept, values = method_by_hand(matrix[rows], tokens, order, config)
            assert torch.equal(mask[rows], kept)
            torch.testing.assert_close(matrix_of(model, name)[rows], values, rtol=1e-3, atol=1e-4)
            assert not matrix_of(model, name)[rows][~kept].any()
            outputs = tokens.double() @ matrix[rows].double().t()
            changed = tokens.double() @ matrix_of(model, name)[rows].double().t()
            error, norm = error + (changed - outputs).square().sum(), norm + outputs.square().sum()
        assert result.layer_errors[name] == pytest.approx(float(error / norm), rel=1e-3)
    result.masks.verify(model)


@pytest.mark.parametrize("method", [METHODS["sequential"], METHODS["iterative"]])
@pytest.mark.parametrize(("name", "exclude"), [("vgg", "features.0"), ("resnext", ""), ("lstm", "tag")])
def test_updates_mend_what_masks_alone_break(name, exclude, method):
    """In the layers that see the data as it is, and so the same inputs whatever the method."""
    errors = {}
    for label, settings in (("mask", {"swaps": 0, "score": "sparsegpt"}), ("update", method)):
        model, data = network(name)
        config = PruningConfig(update="none", exclude=(exclude,) if exclude else (), **settings)
        result = prune(model, [data], config)
        result.masks.verify(model)
        dense, _ = network(name)
        for weight, groups in gathered(dense, [data]).items():
            if weight in result.masks:
                matrix = matrix_of(dense, weight) - matrix_of(model, weight)
                parts = [(tokens @ matrix[rows].t()).square().sum() for rows, tokens in by_groups(matrix, groups)]
                errors[label] = errors.get(label, 0) + float(sum(parts))
    assert errors["update"] < errors["mask"]


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_with_new_values(method):
    config = PruningConfig(update="none", **METHODS[method])
    plain, data = one_layer("convolution")
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    masks, others = (prune(model, [data], config).masks for model in (plain, last))
    assert masks.digest() == others.digest()
    assert not last[0].weight.is_contiguous()
    torch.testing.assert_close(last[0].weight, plain[0].weight, rtol=1e-4, atol=1e-5)
