from __future__ import annotations

import math
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from timed_runs import Clock, Timed, budget_of_seconds, finite, make_trainer, seconds_spent, stream

from sparsefit.callbacks.budget import GPUHourBudget
from sparsefit.callbacks.trainer_lookup import budget_of, ledger_of

# Stopping.


@pytest.mark.parametrize("fit_start", [0.0, 30.5])
def test_a_stream_stops_inside_the_budget_and_fit_start_counts(fit_start):
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, step=2.0, fit_start=fit_start)
    make_trainer(budget).fit(module, stream())
    assert module.batches == math.floor((90 - fit_start) / 2)
    assert seconds_spent(budget) == pytest.approx(fit_start + 2 * module.batches)
    assert budget.ledger.seconds.get("setup", 0.0) == pytest.approx(fit_start)
    assert budget.ledger.seconds["training"] == pytest.approx(2 * module.batches)
    assert "GPU-hours are spent" in budget.stop_reason


def test_a_step_that_suddenly_takes_longer_overshoots_by_that_step_alone():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.0)

    class Slows(Timed):
        def training_step(self, batch, batch_idx):
            self.step = 1.0 if batch_idx < 98 else 7.0
            return super().training_step(batch, batch_idx)

    module = Slows(clock)
    make_trainer(budget).fit(module, stream())
    assert seconds_spent(budget) == pytest.approx(98 + 7)


def test_the_longest_recent_step_must_fit():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.0)

    class Uneven(Timed):
        def training_step(self, batch, batch_idx):
            self.step = 6.0 if batch_idx % 5 == 4 else 1.0
            return super().training_step(batch, batch_idx)

    make_trainer(budget).fit(Uneven(clock), stream())
    assert 94 < seconds_spent(budget) <= 100


def test_time_kept_for_the_closing_raises_the_reserve():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.05)
    budget.keep(3.0)
    budget.keep(20.0)
    budget.keep(10.0, "export")
    module = Timed(clock)
    make_trainer(budget).fit(module, stream())
    assert module.batches == 70


def test_every_hook_of_the_run_is_charged_to_its_stage():
    class Report(Callback):
        def on_fit_start(self, trainer, pl_module):
            with ledger_of(trainer).stage("calibration"):
                clock.now += 11

        def on_sanity_check_end(self, trainer, pl_module):
            clock.now += 7

        def on_train_end(self, trainer, pl_module):
            clock.now += 2
            with ledger_of(trainer).stage("export"):
                clock.now += 3

    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, validation=1.0)
    make_trainer(budget, Report(), num_sanity_val_steps=2, val_check_interval=20).fit(module, stream(), finite(4))
    assert budget.ledger.seconds["calibration"] == pytest.approx(11)
    assert budget.ledger.seconds["export"] == pytest.approx(3)
    assert budget.ledger.seconds["setup"] == pytest.approx(7)
    assert budget.ledger.seconds["closing"] == pytest.approx(2)
    assert budget.ledger.seconds["training"] == pytest.approx(module.batches)
    # 11 + 2 + 7 are spent before training; 4 more of each validation, of which the last comes with the stop.
    assert budget.ledger.seconds["validation"] == pytest.approx(2 + 4 * (module.batches // 20 + 1))
    assert seconds_spent(budget) <= 90 + 5
    assert seconds_spent(budget) > 90 + 5 - 5


@pytest.mark.parametrize("sanity_steps", [1, 2])
def test_the_closing_validation_is_kept_from_the_sanity_check_on(sanity_steps):
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.0)
    module = Timed(clock, validation=1.0)
    make_trainer(budget, num_sanity_val_steps=sanity_steps).fit(module, stream(), finite(20))
    assert module.batches == 100 - sanity_steps - 20
    assert seconds_spent(budget) == pytest.approx(100)


def test_it_stops_after_a_validation_that_leaves_too_little_for_another():
    clock = Clock()
    budget = budget_of_seconds(clock, 105, reserve=0.0)
    module = Timed(clock, validation=10.0)
    trainer = make_trainer(budget, num_sanity_val_steps=0, val_check_interval=40)
    trainer.fit(module, stream(), finite(1))
    # 40 steps, 10, 40 steps, 10 = 100: of the 5 left, a step could be paid for, but not the validation that follows.
    assert (module.batches, seconds_spent(budget)) == (80, pytest.approx(100))


def test_no_validation_is_kept_for_when_none_will_run():
    clock = Clock()
    budget = budget_of_seconds(clock, 50, reserve=0.0)
    module = Timed(clock, validation=10.0)
    trainer = make_trainer(budget, num_sanity_val_steps=1, check_val_every_n_epoch=2)
    trainer.fit(module, stream(), finite(1))
    assert (module.batches, seconds_spent(budget)) == (40, pytest.approx(50))


def test_data_of_known_length_and_several_epochs():
    clock = Clock()
    budget = budget_of_seconds(clock, 50, reserve=0.0, drive_learning_rate=False)
    module = Timed(clock)
    make_trainer(budget).fit(module, finite(8))
    assert module.batches == 50


# Around training.


def test_validate_and_test_charge_nothing():
    class Tested(Timed):
        def test_step(self, batch, batch_idx):
            self.clock.now += 5

    clock = Clock()
    budget = budget_of_seconds(clock, 20, reserve=0.0)
    module = Tested(clock, validation=5.0)
    trainer = make_trainer(budget)
    trainer.validate(module, finite(2), verbose=False)
    assert seconds_spent(budget) == 0
    trainer.fit(module, stream())
    trainer.validate(module, finite(2), verbose=False)
    trainer.test(module, finite(2), verbose=False)
    assert seconds_spent(budget) == pytest.approx(20)


def test_fast_dev_run():
    clock = Clock()
    module = Timed(clock, validation=1.0)
    make_trainer(budget_of_seconds(clock, 3600), fast_dev_run=True).fit(module, stream(), finite(2))
    assert module.batches == 1


def test_a_module_without_optimizer():
    class Unoptimized(Timed):
        def configure_optimizers(self):
            return None

        def on_before_optimizer_step(self, optimizer):
            assert not optimizer.param_groups

    clock = Clock()
    module = Unoptimized(clock)
    budget = budget_of_seconds(clock, 10, reserve=0.0)
    with pytest.warns(UserWarning, match="configure_optimizers"):
        make_trainer(budget).fit(module, stream())
    assert module.batches == 10


def test_spent_hours_and_rate_reach_the_logger(tmp_path):
    clock = Clock()
    module = Timed(clock, step=36.0)
    logger = CSVLogger(tmp_path)
    budget = budget_of_seconds(clock, 360, reserve=0.0)
    make_trainer(budget, logger=logger, log_every_n_steps=2).fit(module, stream())
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), map(float, line.split(",")), strict=True)) for line in lines[1:]]
    assert [row["gpu_hours"] for row in rows] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert [row["learning_rate"] for row in rows] == pytest.approx(module.rates[1::2])


@pytest.mark.parametrize("budget_first", [True, False])
def test_other_callbacks_find_the_ledger_in_their_own_setup(budget_first):
    class Early(Callback):
        def setup(self, trainer, pl_module, stage):
            with ledger_of(trainer).stage("loading"):
                clock.now += 4

    clock = Clock()
    budget = budget_of_seconds(clock, 10, reserve=0.0)
    module = Timed(clock)
    trainer = make_trainer(*([budget, Early()] if budget_first else [Early(), budget]))
    trainer.fit(module, stream())
    assert budget.ledger.seconds == pytest.approx({"loading": 4, "training": 6})
    assert ledger_of(trainer) is budget.ledger
    assert not budget.ledger.running


def test_a_trainer_without_budget_has_a_ledger_of_its_own():
    trainer, other = make_trainer(), make_trainer()
    ledger = ledger_of(trainer)
    assert ledger is ledger_of(trainer)
    assert ledger is not ledger_of(other)
    assert ledger.running
    assert budget_of(trainer) is None
    with ledger.stage("pruning"):
        sum(range(1000))
    assert ledger.seconds["pruning"] > 0


def test_the_real_clock_is_the_default():
    budget = GPUHourBudget(gpu_hours=0.5 / 3600, reserve=0.0)
    module = Timed(Clock())
    make_trainer(budget).fit(module, stream())
    assert module.batches > 0
    assert seconds_spent(budget) > 0.4
