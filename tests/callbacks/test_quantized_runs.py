"""`QuantizedBase`: its checkpoints, two ranks, and a real model."""

from __future__ import annotations

import os
import warnings

import pytest
import resumed_runs
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from quantized_fits import HELD, NAMES, assert_same, callbacks, held_layers, module, state, train
from ranks import on_ranks
from safetensors.torch import load_file
from small_runs import fit, text, trainer_with

from sparsefit.callbacks import PrunedRunCallback, WandaPruning
from sparsefit.callbacks.quantization import KEY, QuantizedBase
from sparsefit.data import TextDataModule
from sparsefit.errors import ConfigError
from sparsefit.modules import CausalLMModule
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.inspection import inspect_folder
from sparsefit.recovery.merge import merge
from sparsefit.recovery.quantize import dequantize_base

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized base")


# Checkpoints.


@pytest.mark.parametrize("form", ["lora", "masked_lora"])
@pytest.mark.parametrize("held", HELD, ids=NAMES)
def test_a_resumed_run_ends_with_the_same_bits(held, form, tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    whole = module(form)
    train(whole, *callbacks(**held), saves, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == module(form).state_dict().keys()
    resumed = module(form, seed=5)
    train(resumed, *callbacks("before", **held), ckpt_path=tmp_path / "step=2.ckpt")
    assert_same(state(resumed), state(whole))
    # The same, into the module that was trained.
    train(whole, *callbacks(**held), ckpt_path=tmp_path / "step=2.ckpt")
    assert_same(state(resumed), state(whole))


@pytest.mark.parametrize("held", HELD, ids=NAMES)
def test_testing_a_checkpoint_uses_the_base_that_was_trained_on(held, tmp_path):
    model = module("lora")
    trainer = train(model, *callbacks(**held))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (expected,) = trainer.test(model, text(4, seed=3), verbose=False)
        again = module("lora", seed=4)
        (found,) = trainer_with(*callbacks(**held)).test(
            again, text(4, seed=3), ckpt_path=tmp_path / "run.ckpt", verbose=False
        )
    assert found == expected
    assert_same(state(again), state(model))


@pytest.mark.parametrize(("held", "first"), [(HELD[1], True), (HELD[2], False)], ids=["nf4-double", "int8"])
def test_a_run_folder_holds_the_base_in_floats_and_its_checkpoints_resume_bit_for_bit(held, first, tmp_path):
    def all_callbacks(folder):
        rest = resumed_runs.callbacks(folder)
        return [QuantizedBase(**held), *rest] if first else [*rest, QuantizedBase(**held)]

    def made():
        return resumed_runs.module(form="masked_lora")

    run, whole, data = tmp_path / "run", made(), resumed_runs.data(tmp_path)
    saves = resumed_runs.every_step(run / "checkpoints")
    resumed_runs.fit(whole, data, *all_callbacks(run), saves, max_steps=4)
    assert not inspect_folder(run / "base").broken
    base = load_file(run / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in base.values()} == {torch.float32}
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    saved = torch.load(run / "checkpoints" / "step=3.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in saved if key.endswith("base_layer.weight") or ".absmax" in key or ".SCB" in key]
    resumed = made()
    callbacks = all_callbacks(run)
    data = resumed_runs.data(tmp_path)
    resumed_runs.fit(resumed, data, *callbacks, max_steps=4, ckpt_path=run / "checkpoints" / "step=3.ckpt")
    assert_same(state(resumed), state(whole))


def test_a_checkpoint_resumed_with_another_base_is_refused(tmp_path):
    train(module(), *callbacks(kind="nf4")).save_checkpoint(tmp_path / "run.ckpt")
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)[KEY]["kind"] == "nf4"
    for held, words in [
        ({"kind": "int8"}, "asks for int8"),
        ({"kind": "nf4", "double_quant": True}, "asks for nf4 with double_quant"),
        ({}, "asks for floats"),
    ]:
        with pytest.raises(ConfigError, match=f"trained on a base held as nf4, .*{words}.*resume with kind: nf4"):
            train(module(), *callbacks(**held), ckpt_path=tmp_path / "run.ckpt")


def test_origins_are_the_sums_of_the_floats(tmp_path):
    from sparsefit.recovery.base_deduplication import checksum

    class Keep(PrunedRunCallback):
        def on_base_ready(self, trainer, module, masks):
            self.base = state(module)

    keep, pair, model = Keep(), callbacks(kind="int8"), module()
    train(model, keep, *pair)
    assert pair[1].origins == {key: checksum(keep.base[key]) for key in held_layers(model)}


# Two processes.


class Save(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        next(c for c in trainer.callbacks if isinstance(c, WandaPruning)).masks.verify(module)
        assert len(held_layers(module)) == 14
        torch.save(module.state_dict(), self.folder / f"{trainer.global_rank}.pt")

    def teardown(self, trainer, module, stage):
        torch.distributed.destroy_process_group()  # a process that ends with one open has aborted, once in a while


def trained_by_forks(folder):
    """The weights of the module that comes back to this process from the ranks that a Trainer forks."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK"):
        del os.environ[name]  # this process is no rank itself
    model = module()
    train(model, *callbacks(kind="int8"), Save(folder), devices=2, strategy="ddp_fork", steps=2)
    return state(model)


def test_two_ranks_train_on_the_same_base(tmp_path):
    (back,) = on_ranks(1, trained_by_forks, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(one, two)
    # What comes back is a module in floats, with the values that were computed with.
    assert back.keys() == module().state_dict().keys()
    trained = [name for name in one if "lora_" in name]
    assert trained
    assert all(torch.equal(back[name], one[name]) for name in trained)
    share = [float((weight == 0).float().mean()) for name, weight in back.items() if "up_proj" in name]
    assert share == [0.5, 0.5]


# A real model.


STEPS = 30


def stories(folder):
    return TextDataModule(
        str(folder / "tinystories656K"),
        train_source=str(folder / "tinystories/train_sample.jsonl"),
        test_source=str(folder / "tinystories/val.jsonl"),
        sequence_length=128,
        batch_size=8,
        calibration="pack",
        calibration_samples=16,
        test_windows=12,
    )


class Losses(PrunedRunCallback):
    """Notes the loss of each step, and the perplexity before and after quantization and at the end."""

    def __init__(self):
        self.losses, self.perplexity = [], {}

    def on_base_ready(self, trainer, module, masks):
        self.evaluate("pruned", trainer, module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if not self.losses:
            self.evaluate("quantized", trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer, module):
        self.evaluate("recovered", trainer, module)

    def evaluate(self, stage, trainer, module):
        self.perplexity[stage] = module.evaluate(trainer.datamodule.test_dataloader())["perplexity"]


@pytest.mark.parametrize("form", ["lora", "masked_lora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_real_model_recovers_on_a_quantized_base(kind, form, shared_data):
    torch.manual_seed(0)
    adapter = AdapterSettings(form, dropout=0.0, target_modules="all-linear")
    model = CausalLMModule(str(shared_data / "tinystories656K"), adapter, learning_rate=2e-3)
    pruning, seen = WandaPruning(0.6), Losses()
    held = QuantizedBase(kind)
    fit(model, stories(shared_data), seen, pruning, held, max_steps=STEPS, max_epochs=-1)
    assert len(held.account["layers"]) == len(pruning.masks) == 14
    pruning.masks.verify(model)
    assert sum(seen.losses[-5:]) < sum(seen.losses[:5])
    found = seen.perplexity
    assert found["quantized"] == pytest.approx(found["pruned"], rel=0.15 if kind == "nf4" else 0.003)
    assert found["recovered"] < 0.9 * found["quantized"]
    if form == "masked_lora":
        dequantize_base(model)
        model.model = merge(model.model, pruning.masks.renamed(lambda name: name.removeprefix("model.")))
        pruning.masks.verify(model)
        loader = model.trainer.datamodule.test_dataloader()
        assert model.evaluate(loader)["perplexity"] == pytest.approx(found["recovered"], rel=1e-4)
