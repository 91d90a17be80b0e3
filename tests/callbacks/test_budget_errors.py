from __future__ import annotations

import math

import pytest
from lightning.pytorch import Callback
from timed_runs import Clock, Timed, budget_of_seconds, finite, make_trainer, stream

from sparsefit.callbacks.budget import GPUHourBudget
from sparsefit.callbacks.trainer_lookup import budget_of
from sparsefit.errors import BudgetError, ConfigError


@pytest.mark.parametrize(
    "arguments",
    [
        *({"gpu_hours": value} for value in (0, -1.0, math.nan, math.inf, True, "5", None)),
        *({"gpu_hours": 1, "reserve": value} for value in (-0.1, 1.0, math.nan, False, "x")),
        *({"gpu_hours": 1, "warmup_steps": value} for value in (-1, 2.5, True, None)),
    ],
)
def test_arguments_that_cannot_work(arguments):
    with pytest.raises(ConfigError, match=list(arguments)[-1]):
        GPUHourBudget(**arguments)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, True])
def test_seconds_that_cannot_be_kept(seconds):
    with pytest.raises(ConfigError, match="export"):
        GPUHourBudget(1.0).keep(seconds, "export")


@pytest.mark.parametrize("arguments", [{"min_steps": 3}, {"min_epochs": 1}])
def test_a_trainer_that_may_not_stop_is_refused(arguments):
    clock = Clock()
    module = Timed(clock)
    with pytest.raises(ConfigError, match="min_steps"):
        make_trainer(budget_of_seconds(clock, 10), **arguments).fit(module, finite(2))
    assert module.batches == 0


class Calibrate(Callback):
    def __init__(self, clock: Clock, batch: float, ask: float = 0.0):
        self.clock, self.batch, self.ask, self.done = clock, batch, ask, 0

    def on_fit_start(self, trainer, pl_module):
        for _ in range(10):
            budget_of(trainer).check_before(trainer, "calibration", self.ask)
            self.clock.now += self.batch
            self.done += 1


@pytest.mark.parametrize(("batch", "ask", "done"), [(1.0, 0.0, 10), (3.0, 0.0, 7), (1.0, 15.0, 5), (1.0, 30.0, 0)])
def test_a_budget_too_small_for_calibration(batch, ask, done):
    clock = Clock()
    budget = budget_of_seconds(clock, 20, reserve=0.05)
    calibrate = Calibrate(clock, batch, ask)
    trainer = make_trainer(budget, calibrate)
    module = Timed(clock)
    if done == 10:
        trainer.fit(module, stream())
        assert module.batches == 9
    else:
        with pytest.raises(BudgetError, match=r"0\.005556 GPU-hours cannot pay for calibration.*[Rr]aise gpu_hours"):
            trainer.fit(module, stream())
        assert module.batches == 0
        assert not budget.ledger.running
    assert calibrate.done == done


def test_a_budget_spent_before_the_first_step_trains_nothing():
    clock = Clock()
    budget = budget_of_seconds(clock, 20)
    module = Timed(clock, fit_start=30)
    with pytest.warns(UserWarning, match="no training step is taken"):
        make_trainer(budget).fit(module, stream())
    assert module.batches == 0


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"reconstruction": 0.2, "training": 0.7}, r"add up to 0\.9.*by shares .* that add up to 1"),
        ({"reconstruction": 20, "training": 80}, r"add up to 100"),
        ({"training": 0.5}, r"add up to 0\.5"),
        ({}, r"add up to 0\."),
        ({"lora": 0.8, "reconstruction": 0.2}, r"'lora'.*'reconstruction' and 'training'"),
        ({"reconstruction": -0.2, "training": 1.2}, r"reconstruction is -0\.2: it must be a number of at least 0"),
        ({"reconstruction": math.nan, "training": 1.0}, r"reconstruction is .*: it must be a number"),
        ({"reconstruction": True}, r"reconstruction is .*: it must be a number"),
        ({"reconstruction": "0.2", "training": 0.8}, r"reconstruction is .*: it must be a number"),
        ([0.2, 0.8], r"name the stages' shares"),
    ],
)
def test_a_split_that_cannot_work(split, message):
    with pytest.raises(ConfigError, match=message):
        GPUHourBudget(1.0, split=split)


@pytest.mark.parametrize(
    "split",
    [{"reconstruction": 0.2, "training": 0.8}, {"training": 1}, {"reconstruction": 1 / 3, "training": 0.6666667}],
)
def test_shares_that_add_up_within_rounding_are_taken(split):
    assert GPUHourBudget(1.0, split=split).split == pytest.approx(split)
