"""The frozen base in 4 and 8 bits: exact zeros, products and gradients of the dequantized weights, and back again."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from quantized_bases import KINDS, MASKED, WIDTHS, layers_of, mask_set, pruned_llama, tokens
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparsefit import PruningConfig, prune
from sparsefit.errors import ConfigError, MaskError
from sparsefit.pruning import MaskSet
from sparsefit.quantized import dequantized, is_quantized
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DenseTeacher
from sparsefit.recovery.quantize import (
    dequantize_base,
    quantize_base,
)

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized base")


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden", "inner"), WIDTHS)
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_every_pruned_weight_is_exactly_zero_and_the_rest_is_near(kind, double, hidden, inner, dtype):
    model, masks = pruned_llama(hidden, inner, dtype)
    before = {name: matrix.clone() for name, matrix in masks.matrices_in(model)}
    report = quantize_base(model, kind, masks, double_quant=double)
    assert sorted(report.layers) == sorted(masks) == sorted(layers_of(model))
    assert not report.left
    masks.verify(model)
    for name, matrix in masks.matrices_in(model):
        assert not matrix[~masks[name]].any()
        away = (matrix.float() - before[name].float()).norm() / before[name].float().norm()
        assert 0 < away < (0.01 if kind == "int8" else 0.12)
    assert type(model.lm_head) is nn.Linear


def test_rows_and_blocks_without_weights_stay_zero():
    torch.manual_seed(0)
    for kind, double in KINDS:
        model = nn.Sequential(nn.Linear(96, 40)).requires_grad_(False)
        mask = torch.rand(40, 96) > 0.5
        mask[:9] = mask[:, 32:] = False
        masks = mask_set({"0.weight": mask})
        masks.apply(model)
        quantize_base(model, kind, masks, double_quant=double)
        masks.verify(model)
        assert model(torch.randn(5, 96)).isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("hidden", "inner"), WIDTHS)
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_layers_compute_with_the_dequantized_weights(kind, double, hidden, inner, mode, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inner, hidden, bias=bias)).requires_grad_(False).train(mode == "train")
    masks = mask_set({"0.weight": torch.rand(hidden, inner) > 0.5})
    masks.apply(model)
    quantize_base(model, kind, masks, double_quant=double)
    assert model[0].training == (mode == "train")
    reference = nn.Linear(inner, hidden, bias=bias)
    reference.load_state_dict({"weight": dequantized(model[0])} | ({"bias": model[0].bias} if bias else {}))
    for shape in [(3, inner), (2, 5, inner), (2, 3, 4, inner)]:
        x, y = torch.randn(shape).requires_grad_(), torch.randn(*shape[:-1], hidden)
        mine = torch.autograd.grad(model(x), x, y)[0]
        theirs = torch.autograd.grad(reference(x), x, y)[0]
        torch.testing.assert_close(model(x), reference(x))
        torch.testing.assert_close(mine, theirs)
        with torch.no_grad():
            torch.testing.assert_close(model(x), reference(x))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lora", "masked_lora"])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 128), (48, 80)])
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_adapters_train_as_on_the_dequantized_weights(kind, double, hidden, inner, form):
    settings = AdapterSettings(form, r=4, dropout=0.0, target_modules=["q_proj", "down_proj"])
    model, masks = pruned_llama(hidden, inner, settings=settings)
    report = quantize_base(model, kind, masks, double_quant=double)
    assert {name.split(".")[-2] for name in report.layers} == MASKED  # adapted and not
    reference = copy.deepcopy(model)
    dequantize_base(reference)
    assert not layers_of(reference)
    gradients = []
    for each in (model, reference):
        each.train()
        batch = tokens()
        hidden_states = each.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        out = each(inputs_embeds=hidden_states, labels=batch["input_ids"])
        out.loss.backward()
        trained = {name: p.grad for name, p in each.named_parameters() if p.requires_grad}
        assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"} or len(trained) == 8
        gradients.append((out.logits, hidden_states.grad, trained))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert all(gradient.any() for gradient in gradients[0][2].values())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trained_biases_get_their_gradients_and_keep_their_dtype(kind):
    settings = AdapterSettings("masked_lora", r=2, dropout=0.0, train_biases=True, target_modules="all-linear")
    model, masks = pruned_llama(bias=True, settings=settings)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert biases
    quantize_base(model, kind, masks, torch.bfloat16 if kind == "nf4" else None)
    kept = dict(model.named_parameters())
    assert all(kept[name] is bias for name, bias in biases.items())
    model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
    # A key's bias moves all scores of a query alike, which changes nothing.
    assert all(p.grad is not None and p.dtype == torch.float32 for p in biases.values())
    assert all(p.grad.any() for name, p in biases.items() if "k_proj" not in name)


def test_the_dtype_of_products():
    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    masks = mask_set({"0.weight": torch.rand(64, 64) > 0.5})
    masks.apply(model)
    plain = copy.deepcopy(model)
    quantize_base(plain, "nf4", masks)
    quantize_base(model, "nf4", masks, compute_dtype=torch.bfloat16)
    x = torch.randn(3, 64)
    rounded = (x.bfloat16() @ dequantized(model[0]).bfloat16().T).float()
    assert torch.equal(model(x), rounded + model[0].bias)
    assert plain(x.bfloat16()).dtype == torch.bfloat16
    assert plain(x).dtype == torch.float32  # the first input does not decide for the others
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).dtype == model(x).dtype == nn.Linear(64, 64)(x).dtype == torch.bfloat16


def test_what_stays_in_floats_is_reported():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).requires_grad_(False)
    masks = prune(model, [tokens()], PruningConfig(score="magnitude")).masks
    report = quantize_base(model, "nf4", masks)
    assert not report.layers
    assert set(report.left.values()) == {"held by a Conv1D, no nn.Linear"}
    assert report.bytes_before == report.bytes_after


def test_stacked_experts_stay_in_floats(tiny_model):
    model = tiny_model("mixtral").requires_grad_(False)
    batch = {"input_ids": torch.randint(3, 61, (4, 10), generator=torch.Generator().manual_seed(0))}
    masks = prune(model, [batch], PruningConfig(score="magnitude")).masks
    report = quantize_base(model, "int8", masks)
    assert {name.split(".")[-2] for name in report.layers} >= {"q_proj", "v_proj"}
    assert report.left
    assert set(report.left.values()) == {"a stack of matrices"}
    masks.verify(model)


def test_shared_weights_stay_in_floats():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    model[2].weight = model[0].weight
    masks = mask_set({f"{n}.weight": torch.rand(8, 8) > 0.5 for n in (0, 1)})
    masks.apply(model)
    report = quantize_base(model, "nf4", masks)
    assert report.left == {"0.weight": "shared with another layer"}
    assert report.layers == ["1.weight"]


def test_a_layer_used_in_two_places_stays_one():
    layer = nn.Linear(8, 8).requires_grad_(False)
    model = nn.ModuleDict({"a": layer, "b": layer})
    masks = mask_set({"a.weight": torch.rand(8, 8) > 0.5})
    masks.apply(model)
    quantize_base(model, "nf4", masks)
    assert model["a"] is model["b"]
    assert is_quantized(model["a"])


# What is refused, before anything is changed.


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_hira_is_refused(kind):
    model, masks = pruned_llama(settings=AdapterSettings("hira", r=2))
    assert_refused(model, masks, kind, r"q_proj has an adapter \(.*\) that computes with the numbers of its weight")


def test_dora_is_refused():
    from peft import LoraConfig, get_peft_model

    bare, masks = pruned_llama()
    model = get_peft_model(bare, LoraConfig(use_dora=True, target_modules=["q_proj"]))
    assert_refused(model, masks, "nf4", r"q_proj has an adapter \(DoRA\)")


def test_a_base_that_trains_is_refused():
    model, masks = pruned_llama(settings=AdapterSettings("full"))
    assert_refused(model, masks, "nf4", r"q_proj\.weight trains, and a quantized weight cannot")


def test_a_base_that_is_not_pruned_is_refused():
    model, masks = pruned_llama()
    model.model.layers[0].mlp.up_proj.weight += 1
    assert_refused(model, masks, "nf4", "pruned weights are not zero", MaskError)


def test_without_bitsandbytes_the_error_says_how_to_install_it(monkeypatch):
    model, masks = pruned_llama()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert_refused(model, masks, "nf4", "pip install bitsandbytes")


def assert_refused(model, masks, kind, message, error=ConfigError):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=message):
        quantize_base(model, kind, masks)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("fp4", {}, "the choices are nf4 and int8"),
        ("int8", {"double_quant": True}, "are settings of nf4"),
        ("int8", {"compute_dtype": torch.bfloat16}, "are settings of nf4"),
    ],
)
def test_settings_that_cannot_work(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        quantize_base(nn.Linear(2, 2), kind, MaskSet(), **settings)


def test_a_teacher_cannot_settle_in_a_quantized_base():
    model, _ = pruned_llama(sparsity=0.0)
    teacher = DenseTeacher(model)
    masks = prune(model, [tokens()], PruningConfig(score="magnitude")).masks
    quantize_base(model, "nf4", masks)
    with pytest.raises(ConfigError, match="distillation needs a base in floats"):
        teacher.settle(model)
