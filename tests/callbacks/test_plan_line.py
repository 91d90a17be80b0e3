"""The line that opens a fit, and the one that follows when its pace is known."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from small_runs import QUIET, Classifier
from timed_runs import Clock, Timed, budget_of_seconds, make_trainer, stream
from torch.utils.data import DataLoader, TensorDataset

from sparsefit.callbacks import GPUHourBudget, WandaPruning


@pytest.fixture
def said(caplog):
    """The messages so far that begin with "Plan:"."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    return lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith("Plan: ")]


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(3, (32,), generator=generator)), batch_size=8)


def fit(module, **settings):
    pruning = WandaPruning(0.5, calibration_samples=8)
    callbacks = [pruning, *settings.pop("callbacks", ())]
    Trainer(**QUIET, max_steps=2, callbacks=callbacks).fit(module, data(), **settings)
    return pruning


def test_it_counts_what_the_fit_then_prunes_and_holds(said):
    module = Classifier()
    pruning = fit(module, callbacks=[GPUHourBudget(0.5, warmup_steps=1)])
    [line] = said()
    parameters = list(module.parameters())
    everything = sum(p.numel() for p in parameters)
    pruned = sum(weights for weights, _ in pruning.masks.counts().values())
    assert line.startswith(f"Plan: {everything:,} weights, {pruned:,} of them")
    assert f"and {everything:,} to train" in line
    # Weights, gradients and two moments of 4 bytes each, and a bit for each pruned weight.
    assert f"at least {(16 * everything + pruned / 8) / 1024:.2f} KiB" in line
    assert line.endswith("0.5 GPU-hours, at most 2 steps")


def test_what_is_frozen_needs_no_gradient_and_plain_descent_no_moments(said):
    module = Classifier(
        optimizer=lambda parameters: torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)
    )
    for parameter in module.model.stem.parameters():
        parameter.requires_grad = False
    fit(module)
    [line] = said()
    everything, frozen = sum(p.numel() for p in module.parameters()), 6 * 8 + 8
    pruned = 2 * 2 * 8 * 16
    assert f"and {everything - frozen:,} to train" in line
    assert f"at least {(8 * everything - 4 * frozen + pruned / 8) / 1024:.2f} KiB" in line
    assert line.endswith("at most 2 steps")


@pytest.mark.parametrize("limit", [{"max_steps": 0}, {"max_epochs": 0}])
def test_a_fit_that_trains_nothing_holds_weights_and_masks(said, limit):
    module = Classifier()
    Trainer(**QUIET, callbacks=[WandaPruning(0.5, calibration_samples=8)], **limit).fit(module, data())
    [line] = said()
    everything, pruned = sum(p.numel() for p in module.parameters()), 2 * 2 * 8 * 16
    assert "and 0 to train" in line
    assert f"at least {(4 * everything + pruned / 8) / 1024:.2f} KiB" in line
    assert line.endswith("at most 0 steps")


def test_a_fit_that_continues_has_it_too(said, tmp_path):
    module = Classifier()
    pruning = WandaPruning(0.5, calibration_samples=8)
    trainer = Trainer(**QUIET, max_steps=2, callbacks=[pruning])
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    Trainer(**QUIET, max_steps=3, callbacks=[WandaPruning(0.5)]).fit(
        Classifier(), data(), ckpt_path=tmp_path / "last.ckpt", weights_only=False
    )
    first, second = said()
    assert second == first.replace("at most 2 steps", "at most 3 steps")


def test_the_pace_tells_what_the_budget_still_buys(said):
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, step=2.0)
    make_trainer(budget).fit(module, stream())
    [line] = said()
    assert "a step takes 2.0 s" in line
    taken = 5  # steps, by which the pace is known
    assert f"buys about {module.batches - taken} more steps" in line


def test_a_limit_that_ends_the_fit_before_its_budget_is_reported(said):
    clock = Clock()
    make_trainer(budget_of_seconds(clock, 1000), max_steps=12).fit(Timed(clock, step=2.0), stream())
    [line] = said()
    assert "the 7 steps to come take about 14.0 s" in line
