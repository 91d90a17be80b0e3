"""Reconstruction, SparseGPT and swaps on convolutions and recurrent layers, compared with plain versions of the methods
on the Gram matrices of their inputs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conv_recurrent_networks import network, one_thread, signals  # noqa: F401
from reference import (
    gram_of,
    reference_least_squares,
    reference_mask,
    reference_sparsegpt,
    reference_swap,
    reference_update,
)
from reference_inputs import spread_weights
from reference_products import by_groups, gathered, matrix_of, side_by_side
from torch import Tensor, nn

from sparsefit import PruningConfig, prune


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
    """The mask and the new values of the rows that multiply some (tokens, in), by the plain versions in float64."""
    weight, gram, pattern = dense[:, order].double().numpy(), gram_of([tokens[:, order]]), config.pattern
    if config.reconstruction == "iterative":
        granularity = "layer" if config.score == "sparsegpt" else "output"
        mask, values = reference_sparsegpt(weight, gram, 0.5, pattern, score=config.score, granularity=granularity)
    else:
        mask = reference_mask(np.abs(weight) * np.sqrt(gram.diagonal()), 0.5, "output", pattern)
        mask = reference_swap(weight, mask, gram, config.swaps, 4 if pattern else len(gram))
        values = np.where(mask, weight, 0)
        if config.reconstruction == "sequential":
            values = reference_update(weight, mask, gram)
        elif config.reconstruction == "least_squares":
            values = reference_least_squares(weight, mask, gram)
    back = np.argsort(order)
    return torch.from_numpy(mask[:, back]), torch.from_numpy(values[:, back]).float()


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
def test_updates_lower_the_error_of_masks(name, exclude, method):
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
