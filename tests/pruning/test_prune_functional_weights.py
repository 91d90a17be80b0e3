"""`prune` on weights that go into a function, without a call of the layer that holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_recurrent_networks import one_thread, signals  # noqa: F401
from reference_inputs import attended, spread_weights
from reference_products import check_model, images, unfolded
from torch import Tensor, nn

from sparsefit import PruningConfig, prune


class Functional(nn.Module):
    """A layer whose weight goes into a function, called with (batch, 8) or (batch, tokens, 8)."""

    def __init__(self, layer: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer.weight)


class Casting(nn.Linear):
    """Computes with a copy of its weight in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


# Linear layers

BY_TOKENS = {
    "linear": lambda x, w: F.linear(x, w),
    "linear by name": lambda x, w: F.linear(input=x, weight=w, bias=None),
    "times t()": lambda x, w: x @ w.t(),
    "times T": lambda x, w: x @ w.T,
    "matmul": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "method": lambda x, w: x.matmul(w.mT),
    "weight first": lambda x, w: w @ x.mT,
    "mm": lambda x, w: torch.mm(x.flatten(0, 1), w.t()),
    "mm, weight first": lambda x, w: torch.mm(w, x.flatten(0, 1).t()),
    "addmm": lambda x, w: torch.addmm(x.new_ones(len(w)), x.flatten(0, 1), w.t()),
    "linalg": lambda x, w: torch.linalg.matmul(x, w.mT),
    "batch of one": lambda x, w: x @ w.t()[None],
    "batch of one, weight first": lambda x, w: w[None] @ x.mT,
    "bmm": lambda x, w: torch.bmm(x, w.t().expand(len(x), -1, -1)),
    "vectors": lambda x, w: [torch.mv(w, token) for token in x.flatten(0, 1)],
    "vectors, method": lambda x, w: [w.mv(token) for token in x.flatten(0, 1)],
    "vectors, weight first": lambda x, w: [w @ token for token in x.flatten(0, 1)],
    "vectors times t()": lambda x, w: [token @ w.t() for token in x.flatten(0, 1)],
    "addmm, method": lambda x, w: x.new_ones(len(w)).expand(x[..., 0].numel(), -1).addmm(x.flatten(0, 1), w.t()),
    "rows apart": lambda x, w: torch.cat([F.linear(x, w[:2]), x @ w[2:].t()], dim=-1),
}


@pytest.mark.parametrize("function", BY_TOKENS.values(), ids=BY_TOKENS)
@pytest.mark.parametrize("selection", [{}, {"granularity": "layer"}, {"pattern": "2:4"}])
def test_the_weight_of_a_linear_layer_in_a_function(function, selection):
    model = spread_weights(Functional(nn.Linear(8, 6), function))
    dense, data = copy.deepcopy(model), signals(4, 5, 8)
    result = prune(model, [data], PruningConfig(update="none", **selection))
    assert not result.notes
    expected = {"layer.weight": [[data.flatten(0, 1)]]}
    check_model(dense, model, result, lambda model: expected, **selection)


def test_rows_of_a_weight_with_inputs_of_their_own():
    """A packed matrix, of which each half multiplies something else."""

    def halves(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x[:, ::2], w[:3]) + x[:, 1::2].exp() @ w[3:].t()

    model = spread_weights(Functional(nn.Linear(8, 6), halves))
    dense, data = copy.deepcopy(model), signals(3, 6, 8)
    result = prune(model, [data], PruningConfig(update="none"))
    inputs = [[data[:, ::2].flatten(0, 1)], [data[:, 1::2].exp().flatten(0, 1)]]
    check_model(dense, model, result, lambda model: {"layer.weight": inputs})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_a_layer_that_casts_its_weight_is_seen_by_its_call(dtype):
    model = spread_weights(nn.Sequential(Casting(8, 6), nn.Tanh(), Casting(6, 4)))
    dense, data = copy.deepcopy(model), signals(4, 5, 8).to(dtype)
    result = prune(model, [data], PruningConfig(update="none"))
    assert not result.notes
    hidden = model[1](dense[0](data)).detach()
    expected = {"0.weight": [[data.flatten(0, 1)]], "2.weight": [[hidden.flatten(0, 1)]]}
    check_model(dense, model, result, lambda model: expected)


# Convolutions, and weights seen in another shape


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}])
def test_the_weight_of_a_convolution_in_a_function(settings):
    layer = nn.Conv2d(4, 6, 3, **settings)
    model = spread_weights(Functional(layer, lambda x, w: F.conv2d(x, w, **settings)))
    dense, data = copy.deepcopy(model), images(3, 8, 4)
    result = prune(model, [data], PruningConfig(update="none"))
    assert not result.notes
    check_model(dense, model, result, lambda model: {"layer.weight": [[unfolded(layer, data)[0]]]})


FLAT = {
    "times patches": (nn.Conv2d(4, 6, 3), lambda x, w: w.flatten(1) @ F.unfold(x, 3)),
    "linear": (nn.Conv2d(4, 6, 1), lambda x, w: F.linear(x.flatten(2).mT, w[:, :, 0, 0])),
    "linear, another view": (nn.Conv2d(4, 6, 1), lambda x, w: x.flatten(2).mT @ w.squeeze().t()),
    "convolution in space": (nn.Conv1d(4, 6, 3), lambda x, w: F.conv2d(x, w[..., None])),
    "convolution of a matrix": (nn.Linear(4, 6), lambda x, w: F.conv2d(x, w[:, :, None, None])),
}


@pytest.mark.parametrize(("layer", "function"), FLAT.values(), ids=FLAT)
def test_a_view_of_another_shape_in_a_function(layer, function):
    model = spread_weights(Functional(copy.deepcopy(layer), function))
    dense, data = copy.deepcopy(model), images(3, 8, 4)
    result = prune(model, [data], PruningConfig(update="none"))
    assert not result.notes
    kernel = {nn.Conv1d: (3, 1), nn.Linear: (1, 1)}.get(type(layer)) or layer.kernel_size
    patches = F.unfold(data, kernel).mT.flatten(0, 1)
    check_model(dense, model, result, lambda model: {"layer.weight": [[patches]]})


# Attention


class Attention(nn.Module):
    """Holds nn.MultiheadAttention and calls the function itself."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.MultiheadAttention(8, 2)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        held, turned = self.held, [tensor.transpose(0, 1) for tensor in (query, memory)]
        projections = held.in_proj_weight, held.in_proj_bias, None, None, False, 0.0
        out = held.out_proj.weight, held.out_proj.bias
        return F.multi_head_attention_forward(turned[0], turned[1], turned[1], 8, 2, *projections, *out, False)[0]


def test_the_weights_of_attention_in_a_function():
    model = spread_weights(Attention())
    dense, data = copy.deepcopy(model), (signals(3, 5, 8), signals(3, 7, 8).exp())
    result = prune(model, [data], PruningConfig(update="none"))
    assert not result.notes
    query, memory = data
    held = copy.deepcopy(dense.held)
    given = [[tensor.flatten(0, 1)] for tensor in (query, memory, memory)]
    attention = attended(held, query, memory, memory)
    expected = {"held.in_proj_weight": given, "held.out_proj.weight": [[attention.flatten(0, 1).detach()]]}
    check_model(dense, model, result, lambda model: expected)


# Products of another kind


def test_a_product_that_cannot_be_seen_is_reported():
    model = spread_weights(Functional(nn.Linear(8, 6), lambda x, w: (x[..., None, :] * w).sum(-1)))
    dense = copy.deepcopy(model)
    result = prune(model, [signals(4, 5, 8)], PruningConfig(update="none"))
    assert len(result.notes) == 1
    assert result.notes[0].startswith("layer.weight saw no calibration token")
    check_model(dense, model, result, lambda model: {}, score="magnitude")
