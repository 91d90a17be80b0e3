"""The masked layer against W + s M (.) (B A) written out with autograd's own operations."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from masked_layers import IN, OUT, masked_layer, matrix, random_adapters, update
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsefit.errors import ConfigError, MaskError


def dense(layer, x, mask, adapters=("default",)):
    return F.linear(x, matrix(layer) + sum(update(layer, mask, name) for name in adapters), layer.base_layer.bias)


def loss_and_gradients(layer, function, x):
    """Output, loss and all gradients: of the input, the adapters, and the weight and bias where they train."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    layer.zero_grad()
    out = function(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).view(out.shape)
    loss = (out.float() * weights).sum() + 0.1 * out.float().square().sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "loss": loss.detach(), "x": x.grad, **found}


def assert_same(layer, got, expected, x, **tolerance):
    a, b = loss_and_gradients(layer, got, x), loss_and_gradients(layer, expected, x)
    assert a.keys() == b.keys()
    assert {"lora_A.default.weight", "lora_B.default.weight"} <= a.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)
    return a


@pytest.mark.parametrize("trains", ["adapters", "bias", "weight and bias"])
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 5, IN), (2, 3, 2, IN), (0, IN)])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
def test_outputs_loss_and_gradients_are_those_of_the_dense_form(kind, bias, shape, trains):
    _, layer, mask = masked_layer(kind, bias)
    if "bias" in trains and bias:
        layer.base_layer.bias.requires_grad_(True)
    layer.base_layer.weight.requires_grad_("weight" in trains)
    x = torch.randn(shape, requires_grad=True)

    def expected(x):
        # What trains is zero outside its mask, and its guard masks the gradient.
        if layer.base_layer.weight.requires_grad:
            kept = F.linear(x, matrix(layer) * mask, layer.base_layer.bias)
            return kept + F.linear(x, update(layer, mask))
        return dense(layer, x, mask)

    found = assert_same(layer, layer, expected, x)
    assert found["x"].shape == shape
    assert ("base_layer.weight" in found) == ("weight" in trains)


def test_an_input_that_needs_no_gradient():
    _, layer, mask = masked_layer()
    assert assert_same(layer, layer, lambda x: dense(layer, x, mask), torch.randn(5, IN))["x"] is None


def test_what_is_not_contiguous():
    _, layer, mask = masked_layer()
    x = torch.randn(IN, 5, 2).permute(2, 1, 0)
    out = assert_same(layer, layer, lambda x: dense(layer, x, mask), x.requires_grad_())["out"]
    assert out.shape == (2, 5, OUT)
    expanded = torch.randn(1, IN).expand(6, IN)
    assert_same(
        layer, lambda x: layer(x).sum(0).expand(3, OUT), lambda x: dense(layer, x, mask).sum(0).expand(3, OUT), expanded
    )


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dropout_acts_on_the_inputs_of_the_update_alone(kind):
    _, layer, mask = masked_layer(kind, dropout=0.4)

    def seeded(function):
        def run(x):
            torch.manual_seed(7)
            return function(x)

        return run

    def expected(x):
        base = F.linear(x, matrix(layer), layer.base_layer.bias)
        return base + F.linear(F.dropout(x, 0.4), update(layer, mask))

    x = torch.randn(2, 5, IN, requires_grad=True)
    dropped = assert_same(layer, seeded(layer), seeded(expected), x)["out"]
    layer.eval()
    whole = assert_same(layer, layer, lambda x: dense(layer, x, mask), x)["out"]
    assert not torch.allclose(dropped, whole)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_with_adapters_in_float32(autocast):
    """The sum is made in float32 and rounded once: to the dtype of the base, or of autocast."""
    _, layer, mask = masked_layer(dtype=torch.float32 if autocast else torch.bfloat16)
    assert {p.dtype for n, p in layer.named_parameters() if "lora" in n} == {torch.float32}
    x = torch.randn(2, 5, IN, dtype=torch.float32 if autocast else torch.bfloat16, requires_grad=True)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    def masked(x):
        with context:
            out = layer(x)
        assert out.dtype == torch.bfloat16
        return out

    def rounded(x):
        whole = (matrix(layer).float() + update(layer, mask)).bfloat16()
        return F.linear(x.bfloat16(), whole, layer.base_layer.bias.bfloat16())

    found = assert_same(layer, masked, rounded, x, rtol=2e-2, atol=4e-2)
    assert found["lora_A.default.weight"].dtype == torch.float32
    assert found["x"].dtype == x.dtype
    exact = F.linear(x.float(), matrix(layer).float() + update(layer, mask), layer.base_layer.bias.float())
    torch.testing.assert_close(found["out"].float(), exact, rtol=2e-2, atol=4e-2)


def test_twice_in_one_graph_and_under_checkpointing():
    _, layer, mask = masked_layer(width=(IN, IN))
    x = torch.randn(5, IN, requires_grad=True)

    def twice(f):
        return lambda x: f(torch.tanh(f(x)))

    expected = twice(lambda x: dense(layer, x, mask))
    assert_same(layer, twice(layer), expected, x)
    assert_same(layer, lambda x: checkpoint(twice(layer), x, use_reentrant=False), expected, x)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_adapters_add_up(dropout):
    model, layer, mask = masked_layer(dropout=dropout)
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    random_adapters(model)
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    x = torch.randn(5, IN, requires_grad=True)
    both = assert_same(layer, layer, lambda x: dense(layer, x, mask, ("default", "second")), x)
    assert "lora_A.second.weight" in both
    model.base_model.set_adapter(["second"])
    torch.testing.assert_close(layer(x), dense(layer, x, mask, ("second",)))


def test_without_its_adapter_it_is_the_base():
    model, layer, _ = masked_layer(dropout=0.3)
    x = torch.randn(5, IN)
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.allclose(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_before_there_are_masks_it_is_the_layer_of_peft(kind, dropout):
    model, layer, _ = masked_layer(kind, dropout=dropout)
    layer.take_mask(None)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"], fan_in_fan_out=kind == "conv1d")
    other = get_peft_model(nn.Sequential(copy.deepcopy(layer.base_layer)), config).train()
    other.load_state_dict(model.state_dict())
    x, outputs = torch.randn(5, IN), []
    for each in (model, other):
        torch.manual_seed(1)
        outputs.append(each(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, theirs[name].grad)


# What cannot be.


def test_a_mask_of_another_shape_is_refused():
    _, layer, mask = masked_layer()
    with pytest.raises(MaskError, match=r"shape \(12, 10\) does not fit .* shape \(10, 12\)"):
        layer.take_mask(mask.T)
    assert torch.equal(layer(torch.ones(1, IN)), masked_layer()[1](torch.ones(1, IN)))


def test_no_derivative_of_the_derivative_is_made_up():
    _, layer, _ = masked_layer()
    x = torch.randn(3, IN, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), [layer.lora_A["default"].weight])


def test_samples_with_adapters_of_their_own_are_refused():
    _, layer, _ = masked_layer()
    with pytest.raises(ConfigError, match="mix adapters"):
        layer(torch.randn(2, IN), adapter_names=["default", "__base__"])
