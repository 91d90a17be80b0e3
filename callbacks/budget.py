"""GPUHourBudget: a run that ends, trained, when its GPU-hours are spent."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from sparsefit.errors import BudgetError, ConfigError
from sparsefit.recovery.ledger import SECONDS_PER_HOUR, GPUHourLedger, Pace, estimate_validation
from sparsefit.recovery.schedule import budget_factor, first_rate, keep_base_rates, progress, set_rates

SYNC_STEPS = 20  # so many steps before the end, an accelerator's queue is awaited before the clock is read


class GPUHourBudget(Callback):
    """Stops training so that the whole run, from its first hook to its export, fits in a number of GPU-hours.

    Wall time x devices is charged from `setup` on: calibration, pruning, sanity check and validation included. The
    charge is saved in checkpoints and goes on from there after a resume. Training stops, on all ranks at the same step,
    when one more step (the longest of the last 10) would not leave the reserve and the time of the validation that
    Lightning runs on stopping. While it trains, the learning rate rises for `warmup_steps` and then falls linearly to
    zero as the budget or `max_steps` (or `max_epochs`, where the data have a length) runs out, whichever is nearest
    (Budgeted Training, https://arxiv.org/abs/1905.04753).

    The rate is set before each optimizer step from the rate each parameter group starts with ("initial_lr"). A module
    that brings learning rate schedulers of its own keeps them, with a warning. A resume with more `gpu_hours` extends
    the run; the rate then rises to what the longer budget says. One callback is one budget: a second `fit` with it
    goes on counting. `Trainer(min_steps=..., min_epochs=...)` would train on past the end and is refused.

    Args:
        gpu_hours: The budget: hours of wall time x devices, on all nodes together.
        warmup_steps: Optimizer steps in which the learning rate rises linearly to its full value.
        reserve: Share of the budget that is kept for the final evaluation and export. It is the least that is kept:
            whoever knows their duration raises it with `keep`.
        drive_learning_rate: False leaves the learning rate alone.

    Raises:
        ConfigError: When an argument is out of range, or the trainer may not stop (`min_steps`, `min_epochs`).
    """

    def __init__(
        self, gpu_hours: float, warmup_steps: int = 5, reserve: float = 0.05, drive_learning_rate: bool = True
    ) -> None:
        super().__init__()
        if not _is_number(gpu_hours) or gpu_hours <= 0:
            raise ConfigError(
                f"gpu_hours must be a positive number, not {gpu_hours!r}: hours of wall time x devices. "
                "Leave GPUHourBudget out to train without a budget."
            )
        if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be a whole number of at least 0, not {warmup_steps!r}.")
        if not _is_number(reserve) or not 0 <= reserve < 1:
            raise ConfigError(f"reserve is a share of the budget, from 0 to below 1 (0.05 is 5%), not {reserve!r}.")
        self.gpu_hours = float(gpu_hours)
        self.warmup_steps = warmup_steps
        self.reserve = float(reserve)
        self.drive_learning_rate = drive_learning_rate
        self.ledger = GPUHourLedger()
        self.stop_reason: str | None = None
        """Why the budget ended training; None as long as it has not."""

        self._kept: dict[str, float] = {}
        self._training_start: float | None = None
        self._pace = Pace()
        self._validation_estimate = 0.0
        self._validation_marks: list[float] = []
        self._stage_before_validation = "setup"
        # What the ranks agreed on last: GPU-hours spent, seconds kept, GPU-hours at which training must end.
        self._spent = 0.0
        self._kept_agreed = 0.0
        self._closing_validation = False
        self._limit = self.gpu_hours
        self._max_steps: float = -1
        self._drives = False
        self._factor: float | None = None
        self._factor_step: int | None = None

    # What other callbacks use.

    @property
    def closing_seconds(self) -> float:
        """Seconds kept on this rank for what follows training, as told by `keep`."""
        return sum(self._kept.values())

    @property
    def reserve_hours(self) -> float:
        """GPU-hours that training must leave: the reserve, and the validation that Lightning runs on stopping."""
        kept = max(self.reserve * self.gpu_hours, self._hours(max(self._kept_agreed, self.closing_seconds)))
        validation = self._pace.validation or self._validation_estimate
        return kept + (self._hours(validation) if self._closing_validation else 0.0)

    def keep(self, seconds: float, what: str = "closing") -> None:
        """Keep at least so much time for what follows training.

        Args:
            seconds: Wall seconds, measured or estimated; ranks may differ, the longest counts.
            what: Seconds kept under different names add up; the same name again replaces its seconds.
        """
        if not _is_number(seconds) or seconds < 0:
            raise ConfigError(f"The seconds to keep for {what} must be a number of at least 0, not {seconds!r}.")
        self._kept[what] = float(seconds)

    def check_before(self, trainer: Trainer, what: str, seconds: float = 0.0) -> None:
        """Raise unless the budget can pay for what comes next. All ranks must call it, and all raise or none.

        Args:
            trainer: The trainer of the run.
            what: What the budget is to pay for, as it reads in the message: "calibration".
            seconds: Wall seconds that it will take, where known.

        Raises:
            BudgetError: When nothing is left beside the reserve, or less than `seconds`.
        """
        needed = self._hours(self._agree(trainer, seconds))
        if self._spent < self._limit and self._spent + needed <= self._limit:
            return
        estimate = f", and {what} needs about {needed:.4g} more" if needed else ""
        raise BudgetError(
            f"The budget of {self.gpu_hours:.4g} GPU-hours cannot pay for {what}: {self._spent:.4g} are spent and "
            f"{self.gpu_hours - self._limit:.4g} are kept for the final evaluation and export{estimate}. "
            "Raise gpu_hours, take fewer calibration samples, or make them shorter."
        )

    # Hooks: the clock.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock: the first hook of all."""
        if stage != TrainerFn.FITTING:
            return
        if trainer.min_steps or trainer.min_epochs:
            raise ConfigError(
                "Trainer(min_steps=..., min_epochs=...) keeps Lightning from stopping when the GPU-hours are spent. "
                "Leave both unset, or leave GPUHourBudget out."
            )
        self.stop_reason = None
        # Another callback's `setup` may have started it already, through `ledger_of`.
        if not self.ledger.running:
            self.ledger.switch("setup")
        self.ledger.start(trainer.world_size)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the base learning rates before a checkpoint brings rates that have already fallen."""
        if self.drive_learning_rate and not trainer.lr_scheduler_configs:
            keep_base_rates(trainer.optimizers)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Charge the sanity check to validation."""
        self._enter_validation()
        self._validation_marks = [self.ledger.clock()]

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate from the sanity check what a whole validation takes."""
        self.ledger.switch(self._stage_before_validation)
        self._validation_marks.append(self.ledger.clock())
        self._validation_estimate = estimate_validation(self._validation_marks, sum(trainer.num_val_batches))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Charge validation to its own stage."""
        if self.ledger.running and not trainer.sanity_checking:
            self._enter_validation()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Take the time of a batch of the sanity check."""
        if trainer.sanity_checking:
            self._validation_marks.append(self.ledger.clock())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the validation, and stop here if another step and another validation do not fit."""
        if not self.ledger.running or trainer.sanity_checking:
            return
        self._agree(trainer)
        self._pace.validation_ended(self._seconds(self._spent))
        self._set_limit(trainer)
        self.ledger.switch(self._stage_before_validation)
        self._stop_if_spent(trainer, self._pace.step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the training part of the budget; after a resume with nothing left, stop before the first step."""
        self.ledger.switch("training")
        self._agree(trainer)
        resumed = self._training_start is not None
        if self._training_start is None:
            self._training_start = self._spent
        self._pace.start(self._seconds(self._spent), trainer.global_step)
        self._factor_step = None
        self._prepare_rates(trainer, pl_module)
        self._stop_if_spent(trainer, self._pace.step)
        if self.stop_reason:
            rank_zero_warn(
                f"GPUHourBudget: no training step is taken: {self.stop_reason}. Raise gpu_hours to "
                + ("train further." if resumed else "train, or prune with fewer or shorter calibration samples.")
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the optimizer step that this batch belongs to."""
        if not self._drives or self._training_start is None:
            return
        keep_base_rates(trainer.optimizers, self._factor)
        if self._factor is None or trainer.global_step != self._factor_step:
            self._factor_step = step = trainer.global_step
            done = progress(self._spent, self._training_start, self._limit, step, self._max_steps)
            self._factor = budget_factor(step, self.warmup_steps, done)
        set_rates(trainer.optimizers, self._factor)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Agree on what is spent, and stop if the next step does not fit."""
        self._await_device(trainer)
        self._agree(trainer)
        stepped = self._pace.batch_ended(self._seconds(self._spent), trainer.global_step)
        # Between two optimizer steps, only a batch more has to fit.
        self._stop_if_spent(trainer, self._pace.step if stepped else self._pace.batch)
        if not trainer.barebones:
            rate = first_rate(trainer.optimizers)
            figures = {"gpu_hours": self._spent} | ({} if rate is None else {"learning_rate": rate})
            pl_module.log_dict(figures, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Charge what follows to the closing stage."""
        self.ledger.switch("closing")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the clock."""
        if stage == TrainerFn.FITTING:
            self.ledger.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the clock; what is spent stays in the ledger."""
        self.ledger.stop()

    # The state in checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What is spent so far and what the next process needs to go on: plain numbers, strings, lists and dicts."""
        return {
            "ledger": self.ledger.state_dict(),
            "training_start": self._training_start,
            "pace": self._pace.state_dict(),
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the charge of a checkpoint; works before and after `on_fit_start`."""
        self.ledger.load_state_dict(state_dict["ledger"])
        self._training_start = state_dict["training_start"]
        self._pace.load_state_dict(state_dict["pace"])
        self._kept = {**state_dict["kept"], **self._kept}

    # Inner workings.

    def _hours(self, seconds: float) -> float:
        return seconds * self.ledger.devices / SECONDS_PER_HOUR

    def _seconds(self, hours: float) -> float:
        return hours * SECONDS_PER_HOUR / self.ledger.devices

    def _agree(self, trainer: Trainer, seconds: float = 0.0) -> float:
        """One small collective: the largest figures of all ranks become everybody's. Returns that of `seconds`."""
        figures = [self.ledger.hours, self.closing_seconds, self._validation_estimate, float(seconds)]
        if trainer.world_size > 1:
            mine = torch.tensor(figures, dtype=torch.float64, device=trainer.strategy.root_device)  # (4,)
            figures = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self._spent, self._kept_agreed, self._validation_estimate, seconds = figures
        self.ledger.align(self._spent)
        self._set_limit(trainer)
        return seconds

    def _set_limit(self, trainer: Trainer) -> None:
        every = trainer.check_val_every_n_epoch
        self._closing_validation = trainer.enable_validation and (
            every is None or (trainer.current_epoch + 1) % every == 0
        )
        self._limit = self.gpu_hours - self.reserve_hours

    def _enter_validation(self) -> None:
        self._stage_before_validation = self.ledger.base_stage
        self.ledger.switch("validation")

    def _stop_if_spent(self, trainer: Trainer, seconds: float) -> None:
        needed = self._hours(seconds)
        # The last digits of a sum of many steps must not cost a step.
        if self._spent < self._limit and self._spent + needed <= self._limit * (1 + 1e-9):
            return
        trainer.should_stop = True
        if self.stop_reason is None:
            self.stop_reason = (
                f"{self._spent:.4g} of {self.gpu_hours:.4g} GPU-hours are spent after {trainer.global_step} steps, "
                f"{self.gpu_hours - self._limit:.4g} are kept for the closing validation, evaluation and export"
                + (f", and the next step may take {needed:.4g}" if needed else "")
            )
            rank_zero_info(f"GPUHourBudget: stopping: {self.stop_reason}.")

    def _prepare_rates(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = bool(trainer.lr_scheduler_configs)
        self._drives = self.drive_learning_rate and not own
        if self.drive_learning_rate and own:
            rank_zero_warn(
                "GPUHourBudget leaves the learning rate to the module's own scheduler, which does not know when the "
                "budget ends. Return no scheduler from configure_optimizers to let the budget drive the rate."
            )
        # With manual optimization, steps are the module's affair and epochs say nothing about their number.
        known = pl_module.automatic_optimization and math.isfinite(trainer.num_training_batches)
        self._max_steps = trainer.estimated_stepping_batches if known else trainer.max_steps

    def _await_device(self, trainer: Trainer) -> None:
        """Close to the end, read the clock when the queued work is done rather than when it is queued."""
        device = trainer.strategy.root_device
        near = self._spent + SYNC_STEPS * self._hours(self._pace.step or math.inf) > self._limit
        if device.type == "cuda" and near:
            torch.cuda.synchronize(device)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
