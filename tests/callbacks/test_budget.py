from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_runs import QUIET
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sparsefit.callbacks.budget import GPUHourBudget
from sparsefit.callbacks.ledgers import budget_of, ledger_of
from sparsefit.errors import BudgetError, ConfigError

BASE_RATE = 0.1


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat(torch.ones(2))


class Timed(LightningModule):
    """A model each of whose hooks takes a fixed time on a clock of its own."""

    def __init__(self, clock: Clock, step=1.0, validation=0.0, fit_start=0.0, slower_by_rank=0.0):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.clock, self.step, self.validation, self.fit_start = clock, step, validation, fit_start
        self.slower_by_rank = slower_by_rank
        self.rates: list[float] = []
        self.batches = 0

    def on_fit_start(self):
        self.clock.now += self.fit_start

    def training_step(self, batch, batch_idx):
        self.clock.now += self.step + self.slower_by_rank * self.global_rank
        self.batches += 1
        return self.layer(batch).sum()

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def validation_step(self, batch, batch_idx):
        self.clock.now += self.validation

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=BASE_RATE)


def budget_of_seconds(clock: Clock, seconds: float, **arguments) -> GPUHourBudget:
    budget = GPUHourBudget(gpu_hours=seconds / 3600, **arguments)
    budget.ledger.clock = clock
    return budget


def make_trainer(*callbacks: Callback, **arguments) -> Trainer:
    return Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": -1} | arguments))


def stream() -> DataLoader:
    return DataLoader(Endless(), batch_size=1)


def finite(count: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(count, 2)), batch_size=1, collate_fn=lambda rows: rows[0][0])


def seconds_spent(budget: GPUHourBudget) -> float:
    return budget.ledger.hours * 3600


def expected_rates(count: int, share_per_step: float, warmup_steps: int = 5) -> list[float]:
    """Straight from the definition: warm-up in fifths, and a line from 1 to 0."""
    return [
        BASE_RATE * (1 - step * share_per_step) * ((step + 1) / warmup_steps if step < warmup_steps else 1)
        for step in range(count)
    ]


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
    assert budget.reserve_hours * 3600 == pytest.approx(5)
    budget.keep(20.0)
    budget.keep(10.0, "export")
    assert budget.closing_seconds == 30
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


# Learning rate.


def test_the_rate_warms_up_and_falls_to_zero_with_the_budget():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, fit_start=50)
    make_trainer(budget).fit(module, stream())
    assert module.rates == pytest.approx(expected_rates(40, 1 / 40))
    assert module.rates[0] > 0
    assert module.rates[-1] == pytest.approx(BASE_RATE / 40)


@pytest.mark.parametrize("limits", [{"max_steps": 20}, {"max_epochs": 2}, {"max_steps": 20, "max_epochs": 3}])
def test_steps_or_epochs_that_end_first_take_the_rate_to_zero(limits):
    clock = Clock()
    budget = budget_of_seconds(clock, 1000)
    module = Timed(clock)
    make_trainer(budget, **limits).fit(module, finite(10))
    assert module.rates == pytest.approx(expected_rates(20, 1 / 20))
    assert budget.stop_reason is None


def test_the_budget_may_end_before_the_steps():
    clock = Clock()
    budget = budget_of_seconds(clock, 40, reserve=0.0)
    module = Timed(clock)
    make_trainer(budget, max_steps=1000).fit(module, stream())
    assert module.rates == pytest.approx(expected_rates(40, 1 / 40))


def test_accumulated_batches_share_a_step():
    clock = Clock()
    budget = budget_of_seconds(clock, 90, reserve=0.0)
    module = Timed(clock)
    make_trainer(budget, accumulate_grad_batches=4).fit(module, stream())
    # 22 steps of 4 batches are 88; a 23rd does not fit, so none of its batches is run.
    assert module.batches == 88
    assert module.rates == pytest.approx(expected_rates(22, 4 / 90))


def test_it_stops_between_two_steps_when_not_even_a_batch_fits():
    clock = Clock()
    budget = budget_of_seconds(clock, 90, reserve=0.0)

    class Slows(Timed):
        def training_step(self, batch, batch_idx):
            self.step = 1.0 if batch_idx < 84 else 3.0
            return super().training_step(batch, batch_idx)

    module = Slows(clock)
    make_trainer(budget, accumulate_grad_batches=4).fit(module, stream())
    assert (module.batches, len(module.rates)) == (86, 21)
    assert seconds_spent(budget) == pytest.approx(90)


def test_manual_optimization_is_driven_too():
    class Manual(Timed):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            for _ in range(2):
                optimizer.step()
                self.rates.append(optimizer.param_groups[0]["lr"])

        def on_before_optimizer_step(self, optimizer):
            pass

    clock = Clock()
    budget = budget_of_seconds(clock, 30, reserve=0.0)
    module = Manual(clock)
    # 35 batches would be 70 steps: their number is the module's affair, so that the budget alone sets the line.
    make_trainer(budget, max_epochs=5).fit(module, finite(7))
    expected = [BASE_RATE * (1 - batch / 30) * min((2 * batch + 1) / 5, 1) for batch in range(30)]
    assert module.rates[::2] == pytest.approx(expected)
    assert module.rates[1::2] == pytest.approx(expected)


def test_a_scheduler_of_the_modules_own_is_left_alone():
    class Scheduled(Timed):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1000)]

    clock = Clock()
    module = Scheduled(clock)
    with pytest.warns(UserWarning, match="own scheduler"):
        make_trainer(budget_of_seconds(clock, 20, reserve=0.0)).fit(module, stream())
    assert module.rates == [BASE_RATE] * 20


def test_the_rate_can_be_left_alone():
    clock = Clock()
    module = Timed(clock)
    make_trainer(budget_of_seconds(clock, 20, reserve=0.0, drive_learning_rate=False)).fit(module, stream())
    assert module.rates == [BASE_RATE] * 20


def test_a_parameter_group_that_appears_later_decays_with_the_others():
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.late)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.late, optimizer, initial_denom_lr=10)

    class TwoGroups(Timed):
        def __init__(self, clock):
            super().__init__(clock)
            self.late = torch.nn.Linear(2, 1)
            self.late_rates = []

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.late(batch).sum()

        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            self.late_rates += [group["lr"] for group in optimizer.param_groups[1:]]

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=BASE_RATE)

    clock = Clock()
    module = TwoGroups(clock)
    make_trainer(Unfreeze(), budget_of_seconds(clock, 50, reserve=0.0)).fit(module, finite(10))
    assert module.rates == pytest.approx(expected_rates(50, 1 / 50))
    assert module.late_rates == pytest.approx([rate / 10 for rate in expected_rates(50, 1 / 50)[20:]])


# Resume.


class KillAfter(Callback):
    def __init__(self, steps: int, path: Path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            pl_module.clock.now += 500  # lost with the process
            raise RuntimeError("killed")


def interrupted(tmp_path: Path, steps: int = 30, seconds: float = 100) -> Path:
    clock = Clock()
    path = tmp_path / "interrupted.ckpt"
    trainer = make_trainer(budget_of_seconds(clock, seconds, reserve=0.1), KillAfter(steps, path))
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(Timed(clock, fit_start=10), stream())
    assert not budget_of(trainer).ledger.running
    return path


def test_a_resumed_run_goes_on_counting(tmp_path):
    path = interrupted(tmp_path)
    clock = Clock(77.0)
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, fit_start=20)
    make_trainer(budget).fit(module, stream(), ckpt_path=path, weights_only=True)
    # 10 + 30 before, 20 for starting again, and 30 of the 90 are left.
    assert module.batches == 30
    assert seconds_spent(budget) == pytest.approx(90)
    assert budget.ledger.seconds == pytest.approx({"setup": 30, "training": 60})
    # The line to zero starts where training first did, after 10 seconds.
    assert module.rates == pytest.approx([BASE_RATE * (90 - now) / 80 for now in range(60, 90)])


def test_a_resume_with_a_larger_budget_extends_the_run(tmp_path):
    path = interrupted(tmp_path)
    clock = Clock()
    budget = budget_of_seconds(clock, 200, reserve=0.1)
    module = Timed(clock)
    make_trainer(budget).fit(module, stream(), ckpt_path=path)
    assert module.batches == 180 - 40
    assert module.rates[0] == pytest.approx(BASE_RATE * (180 - 40) / 170)


def test_time_kept_in_the_first_process_is_kept_in_the_next(tmp_path):
    clock = Clock()
    budget = budget_of_seconds(clock, 100)
    budget.keep(25.0, "evaluation")
    budget.keep(9.0, "export")
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(budget, KillAfter(30, tmp_path / "interrupted.ckpt")).fit(Timed(clock), stream())
    clock = Clock()
    budget = budget_of_seconds(clock, 100)
    budget.keep(5.0, "export")
    module = Timed(clock)
    make_trainer(budget).fit(module, stream(), ckpt_path=tmp_path / "interrupted.ckpt")
    assert module.batches == 100 - 30 - 25 - 5


def test_a_state_restored_after_setup_counts_too(tmp_path, monkeypatch):
    path = interrupted(tmp_path)
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, fit_start=20)
    trainer = make_trainer(budget)
    monkeypatch.setattr(type(trainer.strategy), "restore_checkpoint_after_setup", True)
    trainer.fit(module, stream(), ckpt_path=path)
    assert module.batches == 30
    assert module.rates[0] == pytest.approx(BASE_RATE * 30 / 80)


def test_base_rates_survive_a_strategy_that_restores_only_the_settings_it_finds(tmp_path, monkeypatch):
    def restore(strategy, checkpoint):
        for group, saved in zip(
            strategy.optimizers[0].param_groups, checkpoint["optimizer_states"][0]["param_groups"], strict=True
        ):
            group.update({key: saved[key] for key in group if key != "params"})

    path = interrupted(tmp_path)
    clock = Clock()
    module = Timed(clock, fit_start=20)
    trainer = make_trainer(budget_of_seconds(clock, 100, reserve=0.1))
    monkeypatch.setattr(type(trainer.strategy), "load_optimizer_state_dict", restore)
    trainer.fit(module, stream(), ckpt_path=path)
    assert module.rates[0] == pytest.approx(BASE_RATE * 30 / 80)


@pytest.mark.parametrize("budget_seconds", [40, 44, 45.0])
def test_a_resume_with_nothing_left_takes_no_step(tmp_path, budget_seconds):
    path = interrupted(tmp_path)
    saved = path.read_bytes()
    clock = Clock()
    budget = budget_of_seconds(clock, budget_seconds, reserve=0.1)
    module = Timed(clock)
    before = module.state_dict()
    trainer = make_trainer(budget, ModelCheckpoint(tmp_path, save_last=False), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="no training step is taken"):
        trainer.fit(module, stream(), ckpt_path=path)
    assert module.batches == 0
    assert trainer.global_step == 30
    assert budget.stop_reason is not None
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == saved
    assert before.keys() == module.state_dict().keys()


def test_the_same_callback_resumed_in_the_same_process(tmp_path):
    clock = Clock()
    path = tmp_path / "interrupted.ckpt"
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, fit_start=10)
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(budget, KillAfter(30, path)).fit(module, stream())
    make_trainer(budget).fit(module, stream(), ckpt_path=path)
    assert seconds_spent(budget) == pytest.approx(90)
    assert module.batches == 30 + 90 - 10 - 30 - 10


# Errors.


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


# Two processes.


class Record(Callback):
    def __init__(self, folder: Path):
        self.folder = folder

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 1:
            budget_of(trainer).keep(20.0)

    def on_fit_start(self, trainer, pl_module):
        # Only rank 1 asks for more than there is.
        try:
            budget_of(trainer).check_before(trainer, "calibration", seconds=1000.0 * trainer.global_rank)
            self.refused = False
        except BudgetError:
            self.refused = True

    def on_train_end(self, trainer, pl_module):
        record = {
            "steps": trainer.global_step,
            "rates": pl_module.rates,
            "hours": ledger_of(trainer).hours,
            "clock": pl_module.clock.now,
            "reason": budget_of(trainer).stop_reason,
            "refused": self.refused,
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(record))


def test_ranks_of_different_speed_stop_together_at_equal_rates(tmp_path):
    clock = Clock()
    # Rank 1 needs 2 seconds for a step, rank 0 one; both are charged what the slower takes, twice (two devices).
    budget = budget_of_seconds(clock, 200, reserve=0.0)
    module = Timed(clock, step=1.0, slower_by_rank=1.0)
    trainer = make_trainer(budget, Record(tmp_path), devices=2, strategy="ddp_spawn", max_steps=500)
    trainer.fit(module, stream())
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == second["steps"] == 40  # (100 - 20 kept by rank 1) / 2
    assert (first["clock"], second["clock"]) == (40, 80)
    assert first["rates"] == second["rates"] == pytest.approx(expected_rates(40, 1 / 40))
    assert first["hours"] == pytest.approx(160 / 3600)
    assert second["hours"] == pytest.approx(160 / 3600)
    assert first["reason"] == second["reason"]
    assert first["refused"]
    assert second["refused"]
