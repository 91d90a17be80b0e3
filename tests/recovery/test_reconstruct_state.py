"""Blocks tuned one by one: dtypes, adapters, interrupts, time, and what cannot be."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from small_pruned_models import BATCHES, IDS, Block, Net, assert_state, changed, pruned, snapshot, state
from torch import nn

from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter, bind_masks
from sparsefit.recovery.block_reconstruction import ReconstructSettings, reconstruct
from sparsefit.recovery.block_runs import adapters_off

# Dtypes, adapters, interrupts.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(tiny_model, dtype):
    model = tiny_model("llama").to(dtype)
    dense, masks = pruned(model)
    was, before = state(model), snapshot(model)
    errors = reconstruct(model, BATCHES, dense, masks, ReconstructSettings(4, 2e-3, 2))
    assert all(error.after < error.before for error in errors)
    assert_state(model, was)
    assert changed(model, before) == set(masks.parameters)
    masks.verify(model)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lora", "masked_lora", "hira"])
def test_adapters_take_no_part(tiny_model, form):
    settings = AdapterSettings(form, target_modules=("q_proj", "down_proj"), train_norms=True)
    bare, model = tiny_model("llama"), attach_adapter(tiny_model("llama"), settings)
    dense, masks = pruned(bare)
    own, own_masks = pruned(model)
    assert {name for name in own if "lora" not in name and "hira" not in name} >= set(dense)
    bind_masks(model, own_masks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_B" in name or "modules_to_save" in name:
                parameter.normal_()
            if "_A" in name:
                parameter.requires_grad_(False)
    was, before = state(model), snapshot(model)
    ran = [reconstruct(net, BATCHES, dense, masks, ReconstructSettings(3, 2e-3, 2)) for net in (bare, model)]
    assert [(e.block, e.before, e.after) for e in ran[0]] == [(e.block, e.before, e.after) for e in ran[1]]
    assert_state(model, was)
    assert not any("lora" in name or "hira" in name or "modules_to_save" in name for name in changed(model, before))
    own_masks.verify(model)
    tuned = model.unload().state_dict()
    assert all(torch.equal(tuned[name], value) for name, value in bare.state_dict().items() if "norm" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", ["forward", "step", "progress"])
def test_an_interrupt_leaves_the_model_whole(tiny_model, monkeypatch, at, dtype):
    model = tiny_model("llama").to(dtype).train()
    model.lm_head.requires_grad_(False)
    dense, masks = pruned(model)
    was, before = state(model), snapshot(model)
    count = 0

    def interrupt(*args, **kwargs):
        nonlocal count
        count += 1
        if count == (2 if at == "progress" else 5):
            raise KeyboardInterrupt

    if at == "step":
        original = torch.optim.Adam.step
        monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: (interrupt(), original(self, *a, **k))[1])
    elif at == "forward":
        original = nn.functional.mse_loss
        monkeypatch.setattr(nn.functional, "mse_loss", lambda *a: (interrupt(), original(*a))[1])
    with pytest.raises(KeyboardInterrupt):
        reconstruct(
            model,
            BATCHES,
            dense,
            masks,
            ReconstructSettings(3, 1e-3, 2),
            progress=interrupt if at == "progress" else None,
        )
    assert_state(model, was)
    masks.verify(model)
    assert not any("layers.2" in name for name in changed(model, before))
    assert all(p.isfinite().all() for p in model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_from_before_have_no_part_and_are_kept(tiny_model, dtype):
    tuned = []
    for stale in (False, True):
        model = tiny_model("llama").to(dtype)
        dense, masks = pruned(model)
        if stale:
            model(input_ids=IDS, labels=IDS).loss.backward()
        held = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        reconstruct(model, BATCHES, dense, masks, ReconstructSettings(2, 1e-3, 2))
        tuned.append(snapshot(model))
        for name, parameter in model.named_parameters():
            kept = parameter.grad is None if held[name] is None else torch.equal(parameter.grad, held[name])
            assert kept, name
    assert all(torch.equal(value, tuned[1][name]) for name, value in tuned[0].items())


class TwoAdapted(nn.Module):
    """Two adapted models in one module."""

    def __init__(self, make):
        super().__init__()
        self.a, self.b = (attach_adapter(make("llama"), AdapterSettings(target_modules=("q_proj",))) for _ in range(2))

    def forward(self, input_ids):
        return self.a(input_ids=input_ids).logits + self.b(input_ids=input_ids).logits


def test_adapters_of_all_parts_are_disabled(tiny_model):
    model = TwoAdapted(tiny_model).eval()
    with torch.no_grad():
        dense = model(IDS)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        adapted = model(IDS)
        with adapters_off(model):
            assert torch.equal(model(IDS), dense)
        assert torch.equal(model(IDS), adapted)
    assert not torch.equal(adapted, dense)


def test_a_matrix_that_blocks_share_is_tuned_once(tiny_model):
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    dense_model = copy.deepcopy(model)
    dense, masks = pruned(model)
    errors = reconstruct(model, BATCHES, dense, masks, ReconstructSettings(6, 3e-3, 2))
    assert all(error.after < error.before for error in errors)
    with torch.no_grad():
        own, target = (m(input_ids=IDS, output_hidden_states=True).hidden_states for m in (model, dense_model))
    real = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(own[1:3], target[1:3], strict=True)]
    assert [error.after for error in errors[:2]] == pytest.approx(real, rel=1e-4)
    masks.verify(model)


# What cannot be, and time.


def test_what_cannot_work_is_reported_before_anything_changes(tiny_model):
    model = tiny_model("llama")
    dense, masks = pruned(model)
    before, was = snapshot(model), state(model)
    with pytest.raises(CalibrationError, match="calibration data and there is none"):
        reconstruct(model, [], dense, masks)
    last = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(ConfigError, match=f"{last} has no dense counterpart"):
        reconstruct(model, BATCHES, {name: t for name, t in dense.items() if name != last}, masks)
    assert changed(model, before) == set()
    assert_state(model, was)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    dense, masks = pruned(plain, [torch.randn(8, 4)])
    with pytest.raises(ConfigError, match="no repeated blocks"):
        reconstruct(plain, [torch.randn(8, 4)], dense, masks)


class Skips(nn.Module):
    """Two lists of blocks; something is computed between the blocks of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Net(), nn.ModuleList(Block(8) for _ in range(2))

    def forward(self, x):
        x = self.first.stem(x)
        for block in self.first.blocks:
            x = block(x)
        return self.second[1](2 * self.second[0](x))


def test_a_later_list_that_cannot_be_run_alone_is_reported_at_once():
    model, x = Skips(), torch.randn(8, 6)
    dense, masks = pruned(model, [x])
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"cannot be reconstructed block by block: .* between blocks 0 and 1"):
        reconstruct(model, [x], dense, masks)
    assert changed(model, before) == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passes": -1}, "passes of the reconstruction is -1"),
        ({"passes": 1.5}, "passes of the reconstruction is 1.5"),
        ({"learning_rate": 0}, "learning_rate of the reconstruction is 0"),
        ({"batch_size": 0}, "batch_size of the reconstruction is 0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReconstructSettings(**settings)


@pytest.mark.parametrize("settings", [{"passes": 0}, {"passes": 3}])
def test_without_passes_or_time_nothing_changes(tiny_model, settings):
    model = tiny_model("llama")
    dense, masks = pruned(model)
    before = snapshot(model)
    limit = None if settings["passes"] == 0 else 0.0
    errors = reconstruct(model, BATCHES, dense, masks, ReconstructSettings(**settings), seconds=limit)
    assert [(error.steps, error.after == error.before) for error in errors] == [(0, True)] * 3
    assert changed(model, before) == set()


@pytest.mark.slow
def test_it_keeps_to_its_time_and_shares_it_out():
    model, x = Net(blocks=4), torch.randn(64, 6)
    dense, masks = pruned(model, [x])
    start = time.monotonic()
    errors = reconstruct(model, [x], dense, masks, ReconstructSettings(10**6, 1e-3, 8), seconds=1.2)
    assert 1.0 < time.monotonic() - start < 1.8
    assert all(error.steps > 5 and error.after < error.before for error in errors)
    assert all(error.seconds == pytest.approx(0.3, abs=0.15) for error in errors)
