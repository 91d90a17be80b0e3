"""Runs without any real text: the dense model writes what it is calibrated on, and what it is recovered on."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import ddp, on_ranks
from small_runs import fit
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsefit.callbacks import BlockwiseReconstruction, GPUHourBudget, SparseCheckpoints, WandaPruning
from sparsefit.callbacks.trainer_lookup import ledger_of
from sparsefit.data import SelfGeneratedDataModule
from sparsefit.errors import BudgetError, ConfigError
from sparsefit.modules import CausalLMModule
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings

SETTINGS = {"sequence_length": 10, "train_tokens": 120, "calibration_samples": 6, "writing_batch_size": 4}


def data_of(folder=None, **settings):
    special = ["<pad>", "<s>", "</s>", *(f"word{number}" for number in range(58))]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(special)}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    folder = folder if folder is None else str(folder)
    return SelfGeneratedDataModule(tokenizer, folder=folder, **(SETTINGS | {"batch_size": 2} | settings))


@pytest.fixture
def module(tiny_model):
    """A function that creates the same module in each call."""

    def make(weight=1.0, form="masked_lora"):
        adapter = AdapterSettings(form=form, r=2, dropout=0.0, target_modules="all-linear")
        torch.manual_seed(0)
        return CausalLMModule(tiny_model("llama"), adapter, DistillSettings(weight=weight), learning_rate=0.01)

    return make


@pytest.fixture
def unwritten(monkeypatch):
    """A function that makes models fail from then on if they are to generate text."""

    def forbid():
        def generate(*args, **settings):
            raise AssertionError("the text is written again")

        monkeypatch.setattr(LlamaForCausalLM, "generate", generate)

    return forbid


class Seen(Callback):
    def __init__(self, stop_after=None):
        self.windows, self.stop_after = [], stop_after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.windows) // 2 == self.stop_after:
            raise KeyboardInterrupt
        self.windows += map(tuple, batch["input_ids"].tolist())


def windows(loader):
    return [tuple(window) for batch in loader for window in batch["input_ids"].tolist()]


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(some, others):
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []


def test_a_model_is_pruned_and_recovered_on_its_own_text_alone(module, tiny_model, tmp_path):
    data, seen, pruning = data_of(), Seen(), WandaPruning(0.5)
    budget = GPUHourBudget(1.0)
    trained = module()
    trainer = fit(trained, data, pruning, budget, seen, max_epochs=1, default_root_dir=tmp_path)
    # The text is the dense model's: one that was never pruned writes the same.
    other = data_of(tmp_path / "other")
    other.write_with(tiny_model("llama"))
    assert sorted(seen.windows) == sorted(windows(other.train_dataloader()))
    assert len(seen.windows) == 12
    assert windows(data.calibration_dataloader()) == windows(other.calibration_dataloader())
    assert (pruning.summary["samples"], pruning.summary["tokens"]) == (6, 60)
    assert "calibration_dataloader" in pruning.summary["source"]
    pruning.masks.verify(trained)
    assert pruning.masks.sparsity == pytest.approx(0.5, abs=0.02)
    assert {file.parent for file in tmp_path.rglob("*.npy")} == {tmp_path / "written_text", tmp_path / "other"}
    seconds = ledger_of(trainer).seconds
    assert 0 < seconds["writing text"] < sum(seconds.values())
    assert budget.ledger.hours == pytest.approx(sum(seconds.values()) / 3600)


def test_calibration_of_ones_own_is_the_same_as_batches_of_the_same_text(module, tiny_model, tmp_path):
    own = WandaPruning(0.5)
    fit(module(), data_of(tmp_path), own, max_steps=0)
    batches = list(data_written(tiny_model, tmp_path).calibration_dataloader())
    given = WandaPruning(0.5, calibration=batches)
    fit(module(), DataLoader(batches, batch_size=None), given, max_steps=0)
    assert own.masks.digest() == given.masks.digest()


def data_written(tiny_model, folder):
    data = data_of(folder)
    data.write_with(tiny_model("llama"))
    return data


def test_what_only_prunes_writes_no_training_text(module, tmp_path):
    fit(module(), data_of(tmp_path), WandaPruning(0.5), max_steps=0)
    assert [file.name.partition("-")[0] for file in tmp_path.glob("*.npy")] == ["calibration"]


@pytest.mark.parametrize("pruning", [{"score": "magnitude", "update": "none"}, {"calibration": "given"}], ids=str)
def test_training_text_is_written_by_the_dense_model_where_pruning_needs_none(module, tiny_model, tmp_path, pruning):
    if "calibration" in pruning:
        pruning = {"calibration": [{"input_ids": torch.randint(3, 61, (4, 10))}]}
    seen = Seen()
    fit(module(), data_of(tmp_path / "a"), WandaPruning(0.5, **pruning), seen, max_epochs=1)
    assert sorted(seen.windows) == sorted(windows(data_written(tiny_model, tmp_path / "b").train_dataloader()))


def test_blockwise_reconstruction_reads_it_too(module, tmp_path):
    pruning, tuning = WandaPruning(0.5), BlockwiseReconstruction(passes=1)
    trainer = fit(module(), data_of(tmp_path), tuning, pruning, max_steps=1)
    assert len(tuning.account["blocks"]) == 3
    assert ledger_of(trainer).seconds["writing text"] > 0


def test_a_fit_without_pruning_trains_on_it(module, tiny_model, tmp_path):
    seen = Seen()
    fit(module(form="lora"), data_of(tmp_path / "a"), seen, max_epochs=1)
    assert sorted(seen.windows) == sorted(windows(data_written(tiny_model, tmp_path / "b").train_dataloader()))


def test_a_second_run_reads_the_text_of_the_first(module, tmp_path, unwritten):
    first, second = Seen(), Seen()
    one, other = module(), module()
    fit(one, data_of(tmp_path), WandaPruning(0.5), first, max_epochs=1)
    unwritten()
    fit(other, data_of(tmp_path), WandaPruning(0.5), second, max_epochs=1)
    assert second.windows == first.windows
    assert_equal(weights(one), weights(other))


def test_a_second_fit_of_the_pruned_model_reads_it_too(module, tmp_path, unwritten):
    pruned, data, pruning = module(), data_of(tmp_path), WandaPruning(0.5)
    fit(pruned, data, pruning, max_epochs=1)
    unwritten()
    seen = Seen()
    fit(pruned, data, pruning, seen, max_epochs=2, default_root_dir=tmp_path / "other")
    assert len(seen.windows) == 24


def test_a_model_that_is_pruned_already_is_not_asked_to_write(module, tmp_path):
    pruned, pruning = module(), WandaPruning(0.5)
    fit(pruned, data_of(tmp_path / "a"), pruning, max_epochs=1)
    with pytest.raises(ConfigError, match=r"is not in .* and the model can be pruned by now"):
        fit(pruned, data_of(tmp_path / "b"), pruning, max_epochs=2)
    assert not list((tmp_path / "b").rglob("*.npy*"))


# Resuming.


def interrupted(module, folder, **settings):
    """The checkpoint of a run that was interrupted after 4 of its 12 steps (2 epochs)."""
    saver = ModelCheckpoint(folder / "checkpoints", save_on_exception=True, save_last=True)
    callbacks = [WandaPruning(0.5), SparseCheckpoints(str(folder)), Seen(stop_after=4), saver]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, data_of(**settings), *callbacks, default_root_dir=folder, enable_checkpointing=True)
    return next((folder / "checkpoints").glob("*.ckpt"))


def resume(module, checkpoint, folder, seen, **settings):
    callbacks = [WandaPruning(0.5), SparseCheckpoints(str(folder)), seen]
    return fit(module, data_of(**settings), *callbacks, ckpt_path=checkpoint, default_root_dir=folder)


def test_a_resumed_run_reads_its_text_and_ends_as_one_that_never_stopped(module, tmp_path, unwritten):
    seen, whole = Seen(), module()
    fit(whole, data_of(), WandaPruning(0.5), seen, default_root_dir=tmp_path / "whole")
    checkpoint = interrupted(module(), tmp_path / "run")
    unwritten()
    rest, resumed = Seen(), module()
    resume(resumed, checkpoint, tmp_path / "run", rest)
    assert rest.windows == seen.windows[8:]
    assert len(seen.windows) == 24
    assert_equal(weights(resumed), weights(whole))


def test_a_run_that_continues_elsewhere_finds_its_text(module, tmp_path, unwritten):
    checkpoint = interrupted(module(), tmp_path / "run")
    unwritten()
    first, second, third = Seen(), Seen(), Seen()
    resume(module(), checkpoint, tmp_path / "other", first)
    shutil.copy(checkpoint, tmp_path / "copied.ckpt")
    resume(module(), tmp_path / "copied.ckpt", tmp_path / "another", second)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    resume(module(), tmp_path / "moved/checkpoints" / checkpoint.name, tmp_path / "third", third)
    assert first.windows == second.windows == third.windows
    assert len(first.windows) == 16


@pytest.mark.parametrize("with_sparse_checkpoints", [True, False])
def test_a_pruned_model_is_not_asked_to_write_again(module, tmp_path, with_sparse_checkpoints):
    checkpoint = interrupted(module(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/written_text")
    resumed = module()
    before = weights(resumed)
    callbacks = [SparseCheckpoints(str(tmp_path / "run"))] if with_sparse_checkpoints else []
    with pytest.raises(ConfigError, match=r"the training text that the dense model wrote is not in .*written_text"):
        fit(resumed, data_of(), WandaPruning(0.5), *callbacks, ckpt_path=checkpoint, default_root_dir=tmp_path / "run")
    if with_sparse_checkpoints:  # it looks before anything is restored
        assert_equal(weights(resumed), before)
    assert not list((tmp_path / "run").rglob("*.npy"))


def test_a_checkpoint_of_a_run_on_other_data_has_no_text_written(module, tmp_path):
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    loader = DataLoader([{"input_ids": torch.randint(3, 61, (2, 10))} for _ in range(3)], batch_size=None)
    fit(module(), loader, WandaPruning(0.5), saver, max_epochs=1, enable_checkpointing=True)
    with pytest.raises(ConfigError, match="the training text that the dense model wrote is not in"):
        fit(module(), data_of(tmp_path), WandaPruning(0.5), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert not list(tmp_path.rglob("*.npy*"))


def test_a_checkpoint_from_before_any_pruning(module, tmp_path):
    """The model of the run generates the text if the checkpoint has the same weights."""
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    loader = DataLoader([{"input_ids": torch.randint(3, 61, (2, 10))} for _ in range(3)], batch_size=None)
    fit(module(), loader, saver, max_steps=1, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    seen = Seen()
    resume = {"ckpt_path": tmp_path / "checkpoints/last.ckpt", "max_epochs": 1}
    fit(module(), data_of(tmp_path / "a"), WandaPruning(0.5), seen, **resume)
    assert len(list((tmp_path / "a").glob("*.npy"))) == 2
    name = next(name for name in checkpoint["state_dict"] if "lm_head" in name)
    checkpoint["state_dict"][name] += 1
    torch.save(checkpoint, tmp_path / "other.ckpt")
    resume["ckpt_path"] = tmp_path / "other.ckpt"
    with pytest.raises(ConfigError, match="saved before the model was pruned, and has other weights"):
        fit(module(), data_of(tmp_path / "b"), WandaPruning(0.5), **resume)
    assert not list((tmp_path / "b").rglob("*.npy*"))


def test_other_settings_are_refused(module, tmp_path):
    checkpoint = interrupted(module(), tmp_path / "run")
    for changed in ({"seed": 1}, {"temperature": 0.5}, {"train_tokens": 240}, {"batch_size": 1}):
        name, value = next(iter(changed.items()))
        with pytest.raises(ConfigError, match=rf"{name} was [\d.]+ and is {value}"):
            resume(module(), checkpoint, tmp_path / "run", Seen(), **changed)
    other = module()
    with torch.no_grad():
        other.model.get_base_model().lm_head.weight[3, 3] += 1
    with pytest.raises(ConfigError, match=r"model was .* and is "):
        resume(other, checkpoint, tmp_path / "run", Seen())


# What it costs, and what cannot work.


def test_a_budget_that_cannot_pay_for_the_text_leaves_the_model_dense(module, tmp_path):
    poor, data = module(), data_of(tmp_path)
    before = weights(poor)
    with pytest.raises(BudgetError, match="cannot pay for writing text"):
        fit(poor, data, WandaPruning(0.5), GPUHourBudget(1e-9))
    assert_equal(weights(poor), before)
    assert list(tmp_path.glob("calibration-*.part0-of-1"))  # what was written is kept


def test_a_module_that_cannot_write_is_refused_before_anything_is_done(tiny_model, tmp_path):
    from small_runs import LanguageModel

    for kind in ("bert", "t5"):
        refused = LanguageModel(tiny_model(kind))
        before = weights(refused)
        with pytest.raises(ConfigError, match="cannot write its own text"):
            fit(refused, data_of(tmp_path), WandaPruning(0.5))
        assert_equal(weights(refused), before)
    assert not list(tmp_path.iterdir())


def test_a_module_of_ones_own_writes_too(tiny_model, tmp_path):
    from small_runs import LanguageModel

    class Own(LanguageModel):
        def training_step(self, batch, batch_idx):
            return self(**batch, labels=batch["input_ids"]).loss

    pruning = WandaPruning(0.5)
    own = Own(tiny_model("gpt2"))
    seen, data = Seen(), data_of(tmp_path)
    fit(own, data, pruning, seen, max_steps=2)
    pruning.masks.verify(own)
    assert sorted(file.name.partition("-")[0] for file in tmp_path.glob("*.npy")) == ["calibration", "training"]
    assert len(seen.windows) == 4
    assert set(seen.windows) <= set(windows(data.train_dataloader()))


def windows_and_masks(module, folder, sizes):
    pruning, seen = WandaPruning(0.5), Seen()
    fit(module, data_of(folder, **sizes), pruning, GPUHourBudget(1.0), seen, **ddp(2), max_epochs=1)
    return seen.windows, pruning.masks.digest()


@pytest.mark.slow
def test_ranks_write_their_shares_of_the_same_text(module, tiny_model, tmp_path):
    # Two batches to calibrate on, and one to train on, which the first rank writes while the second has nothing to do.
    sizes = {"calibration_samples": 24, "writing_batch_size": 12}
    (first, digest), (second, other) = on_ranks(2, windows_and_masks, module(), tmp_path / "text", sizes)
    alone = data_of(tmp_path / "alone", **sizes)
    alone.write_with(tiny_model("llama"))
    assert sorted(first + second) == sorted(windows(alone.train_dataloader()))
    assert len(first) == len(second) == 6
    assert digest == other
    assert sorted(f.name for f in (tmp_path / "text").iterdir()) == sorted(
        f.name for f in (tmp_path / "alone").iterdir()
    )


# The loss.


def test_a_weight_of_one_computes_no_loss_on_the_text(module, tmp_path, monkeypatch):
    data = data_of(tmp_path)
    asked = []
    forward = LlamaForCausalLM.forward

    def watched(self, *args, labels=None, **settings):
        asked.append(labels is not None)
        return forward(self, *args, labels=labels, **settings)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    alone = fit(module(weight=1.0), data, WandaPruning(0.5), max_steps=2)
    assert not any(asked)
    assert "train_loss" not in alone.logged_metrics
    assert alone.logged_metrics["train_divergence"] > 0
    mixed = fit(module(weight=0.5), copy.deepcopy(data), WandaPruning(0.5), max_steps=2)
    assert sum(asked) == 2
    assert mixed.logged_metrics["train_loss"] > 0
