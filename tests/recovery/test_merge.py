"""Merging: no zero is lost, the model is the one that was trained, and what cannot be changes nothing."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from trained_models import IDS, assert_untouched, logits, snapshot, train

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import MaskError, MergeError
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter, bind_masks
from sparsefit.recovery.merge import lossy_layers, merge


def adapted(model, settings, steps=3, bind=True, pruning=None, batch=None):
    """A pruned model with its adapters, trained a little, and its masks."""
    torch.manual_seed(0)
    batch = {"input_ids": IDS} if batch is None else batch
    model = attach_adapter(model, settings)
    masks = prune(model, [batch], pruning or PruningConfig()).masks
    if bind:
        bind_masks(model, masks)
    train(model, masks, batch, steps)
    return model.eval(), masks


def assert_zeros(model, masks):
    masks.verify(model)
    for name, matrix in masks.matrices_in(model):
        pruned = matrix[~masks[name]]
        assert len(pruned) > 0
        assert not torch.signbit(pruned).any()


ALL = AdapterSettings("masked_lora", target_modules="all-linear", dropout=0.0)
CASES = {
    "masked": ("llama", ALL),
    "masked, some": ("llama", AdapterSettings("masked_lora", dropout=0.3)),
    "masked, transposed": ("gpt2", ALL),
    "masked, norms and biases": (
        "opt",
        AdapterSettings("masked_lora", target_modules=("q_proj", "fc2"), train_norms=True, train_biases=True),
    ),
    "masked, experts": ("mixtral", ALL),
    "hira": ("llama", AdapterSettings("hira", target_modules="all-linear")),
    "hira, transposed": ("gpt2", AdapterSettings("hira", target_modules="all-linear", train_norms=True)),
    "full": ("opt", AdapterSettings("full", target_modules="all-linear", train_norms=True, train_biases=True)),
    "full, experts": ("mixtral", AdapterSettings("full", target_modules="all-linear")),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_zeros_are_exact_and_the_model_is_the_one_that_was_trained(tiny_model, case, dtype):
    architecture, settings = CASES[case]
    bare = tiny_model(architecture, dtype=dtype).to(dtype)
    names = bare.state_dict().keys()
    start = copy.deepcopy(bare)
    model, masks = adapted(bare, settings)
    with torch.no_grad():
        expected = logits(model)
    assert lossy_layers(model, masks) == []
    merged = merge(model, masks)
    assert merged is bare
    assert merged.state_dict().keys() == names
    assert_zeros(merged, masks)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    torch.testing.assert_close(logits(merged), expected, **tolerance)
    if settings.form == "masked_lora" and architecture in ("llama", "mixtral"):  # no biases: rounded alike
        assert torch.equal(logits(merged), expected)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    changed = {
        name
        for name, value in merged.state_dict().items()
        if not torch.equal(
            value if name not in masks else value[kept(masks, name, value)], at_start(start, masks, name)
        )
    }
    assert ("model.decoder.layers.1.fc1.bias" in changed) == (architecture == "opt")
    assert any("norm" in name or "ln_" in name for name in changed) == settings.train_norms


def kept(masks, name, like):
    return masks.for_parameter(name, like)


def at_start(model, masks, name):
    value = model.state_dict()[name]
    return value if name not in masks else value[kept(masks, name, value)]


@pytest.mark.parametrize("form", ["lora", "masked_lora"])
def test_adapters_that_would_fill_zeros_are_refused(tiny_model, form):
    """Plain LoRA, and a masked adapter without its masks."""
    model, masks = adapted(tiny_model("llama"), AdapterSettings(form), bind=False)
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"fill pruned weights of 6 matrices .*q_proj.*masked_lora or hira"):
        merge(model, masks)
    assert_untouched(model, before)
    assert len(lossy_layers(model, masks)) == 6

    trained = logits(model)
    merged = merge(model, masks, reapply_masks=True)
    assert_zeros(merged, masks)
    assert not torch.allclose(logits(merged), trained, atol=1e-2)


def test_plain_adapters_on_layers_without_masks_merge(tiny_model):
    pruning = PruningConfig(exclude=("q_proj", "v_proj"))
    model, masks = adapted(tiny_model("llama"), AdapterSettings("lora", dropout=0.0), pruning=pruning)
    trained = logits(model)
    merged = merge(model, masks)
    assert_zeros(merged, masks)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)


def test_plain_adapters_on_stacked_experts_are_refused(tiny_model):
    config = peft.LoraConfig(r=2, target_modules=["w1", "w2", "w3"])  # what PEFT makes of these names
    model = peft.get_peft_model(tiny_model("mixtral"), config)
    masks = prune(model, [{"input_ids": IDS}]).masks
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"6 matrices \(model\.layers\.0\.mlp\.experts"):
        merge(model, masks)
    assert_untouched(model, before)


def renamed(masks):
    return masks.renamed(lambda name: f"other.{name}")


def other_shape(masks):
    found = MaskSet()
    for name in masks:
        found.add(name, masks[name][:, :-1])
    return found


def other_zeros(masks):
    found = MaskSet()
    for name in masks:
        found.add(name, masks[name].flip(0))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("reapply", [False, True])
@pytest.mark.parametrize("of_another", [renamed, other_shape, other_zeros])
@pytest.mark.parametrize("form", ["lora", "masked_lora", "hira", "full"])
def test_masks_of_another_model_are_refused(tiny_model, form, of_another, reapply):
    model, masks = adapted(tiny_model("llama"), AdapterSettings(form))
    before = snapshot(model)
    with pytest.raises(MaskError):
        merge(model, of_another(masks), reapply_masks=reapply)
    assert_untouched(model, before)


def test_an_adapter_bound_to_other_masks_is_refused(tiny_model):
    model, masks = adapted(tiny_model("llama"), AdapterSettings("masked_lora"))
    bind_masks(model, other_zeros(masks))
    before = snapshot(model)
    with pytest.raises(MaskError, match="keeps to another mask"):
        merge(model, masks)
    assert_untouched(model, before)
    bind_masks(model, masks)
    assert_zeros(merge(model, masks), masks)


@pytest.mark.parametrize("form", ["masked_lora", "hira"])
def test_a_broken_adapter_is_refused(tiny_model, form):
    model, masks = adapted(tiny_model("llama"), AdapterSettings(form))
    last = [parameter for name, parameter in model.named_parameters() if f"{form[-4:]}_B" in name][-1]
    with torch.no_grad():
        last[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"layers\.2\.self_attn\.v_proj\.weight holds values that are NaN or infinite"):
        merge(model, masks)
    assert_untouched(model, before)


def test_several_adapters_merge_together(tiny_model):
    model, masks = adapted(tiny_model("llama"), AdapterSettings("masked_lora", dropout=0.0))
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(0, 0.1)
    model.base_model.set_adapter(["default", "second"])
    trained = logits(model)
    merged = merge(model, masks)
    assert_zeros(merged, masks)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("form", ["masked_lora", "hira", "full"])
def test_a_plain_module(form):
    torch.manual_seed(0)
    net, x = nn.Sequential(Block(), Block(), Block()), torch.randn(20, 8)
    model, masks = adapted(net, AdapterSettings(form, target_modules=("up", "down")), batch=x)
    expected = model(x)
    merged = merge(model, masks)
    assert_zeros(merged, masks)
    torch.testing.assert_close(merged(x), expected)
    assert type(merged[0].up) is nn.Linear
