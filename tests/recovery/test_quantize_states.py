"""A base in 4 and 8 bits put back in floats, saved, loaded and counted."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_bases import KINDS, assert_same_bits, layers_of, logits, pruned_llama
from torch import nn

from sparsefit.quantized import dequantized
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.merge import merge
from sparsefit.recovery.quantize import (
    base_bytes,
    dequantize_base,
    in_floats,
    quantize_base,
    restore_scales,
    to_float_state,
)

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized base")

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_floats_put_back_answer_as_the_quantized_model_did_and_merge(kind, double, dtype):
    settings = AdapterSettings("masked_lora", r=4, target_modules=["q_proj", "down_proj"])
    model, masks = pruned_llama(dtype=dtype, settings=settings)
    model.eval()
    quantize_base(model, kind, masks, double_quant=double)
    expected, held = logits(model), {name: dequantized(layer) for name, layer in layers_of(model).items()}
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    with in_floats(model):
        assert not layers_of(model)
        torch.testing.assert_close(logits(model), expected, **tolerance)
    assert torch.equal(logits(model), expected)
    dequantize_base(model)
    masks.verify(model)
    for name, parameter in model.named_parameters():
        if name in held:
            assert parameter.dtype == dtype
            assert not parameter.requires_grad
            assert torch.equal(parameter, held[name].to(dtype))
    torch.testing.assert_close(logits(model), expected, **tolerance)
    merged = merge(model, masks)
    masks.verify(merged)
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(logits(merged), expected, **tolerance)


def test_a_failure_in_floats_leaves_the_base_quantized():
    model, masks = pruned_llama()
    quantize_base(model, "nf4", masks)
    before = layers_of(model)
    with pytest.raises(RuntimeError, match="on purpose"), in_floats(model):
        raise RuntimeError("on purpose")
    assert layers_of(model) == before


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_state_in_floats_is_quantized_to_the_same_bits(kind, double, dtype):
    model, masks = pruned_llama(96, 80, dtype)
    again, fresh = copy.deepcopy(model), copy.deepcopy(model)
    names = set(model.state_dict())
    quantize_base(model, kind, masks, double_quant=double)
    state = dict(model.state_dict())
    assert set(state) > names
    scales = to_float_state(model, state)
    assert set(state) == names
    masks.verify(state)
    again.load_state_dict(state)
    quantize_base(again, kind, masks, double_quant=double)
    restore_scales(again, scales)
    quantize_base(fresh, kind, masks, double_quant=double)  # and the same floats give the same bits
    for other in (again, fresh):
        assert_same_bits(other, model)
        assert torch.equal(logits(other.eval()), logits(model.eval()))


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_quantized_model_loads_floats(kind, double):
    model, masks = pruned_llama(48, 80)
    other, floats = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for _, matrix in masks.matrices_in(other):
            matrix.mul_(1.5)
    for each in (model, other):
        quantize_base(each, kind, masks, double_quant=double)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(floats)
    assert_same_bits(other, model)
    assert torch.equal(logits(other), logits(model))


def test_weights_left_out_of_a_state_stay_left_out():
    model, masks = pruned_llama()
    quantize_base(model, "nf4", masks)
    left_out = "model.layers.0.mlp.up_proj.weight"
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(left_out)}
    scales = to_float_state(model, state)
    assert not [key for key in (*state, *scales) if key.startswith(left_out)]


def test_bytes_count_scales_and_shared_tensors_once():
    model, masks = pruned_llama(settings=AdapterSettings(r=4))
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    assert base_bytes(model) == 4 * weights + base_buffers(model)
    pruned = sum(size for size, _ in masks.counts().values())
    report = quantize_base(model, "nf4", masks)
    assert report.bytes_before - report.bytes_after == pytest.approx(pruned * (4 - 0.5 - 4 / 64), rel=0.02)
    assert base_bytes(model) == report.bytes_after


def base_buffers(model):
    return sum(b.nbytes for _, b in model.named_buffers() if _.split(".")[-1] in model.state_dict())


def test_a_second_time_changes_nothing():
    model, masks = pruned_llama()
    quantize_base(model, "nf4", masks)
    before = layers_of(model)
    report = quantize_base(model, "nf4", masks)
    assert layers_of(model) == before
    assert set(report.left.values()) == {"is quantized already"}
    assert not report.layers
