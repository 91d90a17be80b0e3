"""GPUHourBudget: a run that ends, trained, when its GPU-hours are spent."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from sparsefit.errors import BudgetError, ConfigError
from sparsefit.recovery.allowance import Allowance
from sparsefit.recovery.ledger import GPUHourLedger, Pace, estimate_validation
from sparsefit.recovery.schedule import DrivenRates, first_rate, keep_base_rates, progress
from sparsefit.settings import named_settings

SYNC_STEPS = 20  # so many steps before the end, an accelerator's queue is awaited before the clock is read


@named_settings
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

    A `split` shares out what is left when calibration and pruning are done, beside what is kept for the closing
    evaluation and export. A stage before training asks for its share with `share_of`. Training, which pays for its
    validations too, has all that is left then: also where such a stage ends early, or where there is none.

    Args:
        gpu_hours: The budget: hours of wall time x devices, on all nodes together.
        warmup_steps: Optimizer steps in which the learning rate rises linearly to its full value.
        reserve: Share of the budget that is kept for the final evaluation and export. It is the least that is kept:
            whoever knows their duration raises it with `keep`.
        drive_learning_rate: False leaves the learning rate alone.
        split: Shares of the stages "reconstruction" and "training", which add up to 1:
            `{reconstruction: 0.2, training: 0.8}`.

    Raises:
        ConfigError: When an argument is out of range, or the trainer may not stop (`min_steps`, `min_epochs`).
    """

    def __init__(
        self,
        gpu_hours: float,
        warmup_steps: int = 5,
        reserve: float = 0.05,
        drive_learning_rate: bool = True,
        split: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.drive_learning_rate = drive_learning_rate
        self.ledger = GPUHourLedger()
        self.stop_reason: str | None = None
        """Why the budget ended training; None as long as it has not."""

        self._allowance = Allowance(gpu_hours, reserve, split)
        self.gpu_hours, self.split = self._allowance.gpu_hours, self._allowance.split
        self._rates = DrivenRates(warmup_steps)
        self._drives = False
        self._max_steps: float = -1
        self._training_start: float | None = None
        self._pace = Pace()
        self._validation_estimate = 0.0
        self._validation_marks: list[float] = []
        self._stage_before_validation = "setup"
        self._kept_agreed = 0.0  # seconds, the most of all ranks
        self._closing_validation = False

    @property
    def closing_seconds(self) -> float:
        """Seconds kept on this rank for what follows training, as told by `keep`."""
        return sum(self._allowance.kept.values())

    @property
    def reserve_hours(self) -> float:
        """GPU-hours that training must leave: the reserve, and the validation that Lightning runs on stopping."""
        validation = (self._pace.validation or self._validation_estimate) if self._closing_validation else 0.0
        kept = max(self._kept_agreed, self.closing_seconds)
        return self._allowance.reserve_hours(self.ledger.hours_of(kept), self.ledger.hours_of(validation))

    def keep(self, seconds: float, what: str = "closing") -> None:
        """Keep at least so much time for what follows training.

        Args:
            seconds: Wall seconds, measured or estimated; of several ranks', the longest count.
            what: Seconds of different names add up; the same name again replaces its own.
        """
        self._allowance.keep(seconds, what)

    def check_before(self, trainer: Trainer, what: str, seconds: float = 0.0) -> None:
        """Raise unless the budget can pay for what comes next. All ranks must call it, and all raise or none.

        Args:
            trainer: The trainer of the run.
            what: What the budget is to pay for, as it reads in the message: "calibration".
            seconds: Wall seconds that it will take, where known.

        Raises:
            BudgetError: When nothing is left beside the reserve, or less than `seconds`.
        """
        needed = self.ledger.hours_of(self._agree(trainer, seconds))
        if not self._allowance.affords(needed):
            raise BudgetError(self._allowance.refusal(what, needed))

    def share_of(self, trainer: Trainer, stage: str) -> float:
        """Wall seconds that a stage may take from now on. All ranks must call it, and all get the same.

        A stage that asks again is told what is left of its share. A budget that is spent gives 0 and a warning instead
        of an error: the model is pruned by then, and is still to be written.

        Args:
            trainer: The trainer of the run.
            stage: "reconstruction", or "training", which may take all that is left; others raise a ConfigError.

        Returns:
            Seconds of at least 0; all that is left where the budget is not split.
        """
        self._agree(trainer)
        if not self._allowance.affords(0.0):
            rank_zero_warn(f"GPUHourBudget: {self._allowance.refusal(stage, 0.0)}")
        return self.ledger.seconds_of(self._allowance.share(stage))

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
        self._allowance.ends.clear()
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
        self._stage_before_validation = self.ledger.switch("validation")
        self._validation_marks = [self.ledger.clock()]

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate from the sanity check what a whole validation takes."""
        self.ledger.switch(self._stage_before_validation)
        self._validation_marks.append(self.ledger.clock())
        self._validation_estimate = estimate_validation(self._validation_marks, sum(trainer.num_val_batches))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Charge validation to its own stage."""
        if self.ledger.running and not trainer.sanity_checking:
            self._stage_before_validation = self.ledger.switch("validation")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Take the time of a batch of the sanity check."""
        if trainer.sanity_checking:
            self._validation_marks.append(self.ledger.clock())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the validation, and stop here if another step and another validation do not fit."""
        if not self.ledger.running or trainer.sanity_checking:
            return
        self._agree(trainer)
        self._pace.validation_ended(self._now)
        self._set_limit(trainer)
        self.ledger.switch(self._stage_before_validation)
        self._stop_if_spent(trainer, self._pace.step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the training part of the budget; after a resume with nothing left, stop before the first step."""
        self.ledger.switch("training")
        self._agree(trainer)
        resumed = self._training_start is not None
        if self._training_start is None:
            self._training_start = self._allowance.spent
        self._pace.start(self._now, trainer.global_step)
        self._rates.begin()
        self._prepare_rates(trainer, pl_module)
        self._stop_if_spent(trainer, self._pace.step)
        if self.stop_reason:
            way_out = "to train further" if resumed else "to train, or prune with fewer or shorter calibration samples"
            rank_zero_warn(f"GPUHourBudget: no training step is taken: {self.stop_reason}. Raise gpu_hours {way_out}.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the optimizer step that this batch belongs to."""
        if not self._drives or self._training_start is None:
            return
        step, allowed = trainer.global_step, self._allowance
        # The first step is the first step, whatever the clock says: also that of a run that is resumed before it.
        done = step and progress(allowed.spent, self._training_start, allowed.limit, step, self._max_steps)
        self._rates.drive(trainer.optimizers, step, done)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Agree on what is spent, and stop if the next step does not fit."""
        self._await_device(trainer)
        self._agree(trainer)
        stepped = self._pace.batch_ended(self._now, trainer.global_step)
        # Between two optimizer steps, only a batch more has to fit.
        self._stop_if_spent(trainer, self._pace.step if stepped else self._pace.batch)
        if not trainer.barebones:
            rate = first_rate(trainer.optimizers)
            figures = {"gpu_hours": self._allowance.spent} | ({} if rate is None else {"learning_rate": rate})
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

    def state_dict(self) -> dict[str, Any]:
        """What is spent so far and what the next process needs to go on: plain numbers, strings, lists and dicts."""
        return {
            "ledger": self.ledger.state_dict(),
            "training_start": self._training_start,
            "pace": self._pace.state_dict(),
            "kept": dict(self._allowance.kept),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the charge of a checkpoint; works before and after `on_fit_start`."""
        self.ledger.load_state_dict(state_dict["ledger"])
        self._training_start = state_dict["training_start"]
        self._pace.load_state_dict(state_dict["pace"])
        self._allowance.kept = {**state_dict["kept"], **self._allowance.kept}

    @property
    def _now(self) -> float:
        """Wall seconds of the run, as the ranks agreed on them last."""
        return self.ledger.seconds_of(self._allowance.spent)

    def _agree(self, trainer: Trainer, seconds: float = 0.0) -> float:
        """One small collective: the largest figures of all ranks become everybody's. Returns that of `seconds`."""
        figures = [self.ledger.hours, self.closing_seconds, self._validation_estimate, float(seconds)]
        if trainer.world_size > 1:
            mine = torch.tensor(figures, dtype=torch.float64, device=trainer.strategy.root_device)  # (4,)
            figures = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self._allowance.spent, self._kept_agreed, self._validation_estimate, seconds = figures
        self.ledger.align(self._allowance.spent)
        self._set_limit(trainer)
        return seconds

    def _set_limit(self, trainer: Trainer) -> None:
        every = trainer.check_val_every_n_epoch
        due = every is None or (trainer.current_epoch + 1) % every == 0
        self._closing_validation = trainer.enable_validation and due
        self._allowance.limit = self.gpu_hours - self.reserve_hours

    def _stop_if_spent(self, trainer: Trainer, seconds: float) -> None:
        needed = self.ledger.hours_of(seconds)
        # The last digits of a sum of many steps must not cost a step.
        if self._allowance.affords(needed, slack=1e-9):
            return
        trainer.should_stop = True
        if self.stop_reason is None:
            self.stop_reason = self._allowance.exhausted(trainer.global_step, needed)
            rank_zero_info(f"GPUHourBudget: stopping: {self.stop_reason}.")

    def _prepare_rates(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drives = self.drive_learning_rate and not trainer.lr_scheduler_configs
        if self.drive_learning_rate and not self._drives:
            rank_zero_warn(
                "GPUHourBudget leaves the learning rate to the module's own scheduler, which does not know when the "
                "budget ends. Return no scheduler from configure_optimizers to let the budget drive the rate."
            )
        # With manual optimization, steps are the module's affair and epochs say nothing about their number.
        known = pl_module.automatic_optimization and math.isfinite(trainer.num_training_batches)
        self._max_steps = trainer.estimated_stepping_batches if known else trainer.max_steps
        if self._drives and 0 < self._max_steps < self._rates.warmup_steps:
            rank_zero_warn(
                f"GPUHourBudget: warmup_steps is {self._rates.warmup_steps} and training ends after {self._max_steps} "
                "steps, before the learning rate has reached its full value. Set fewer warmup_steps"
            )

    def _await_device(self, trainer: Trainer) -> None:
        """Close to the end, read the clock when the queued work is done rather than when it is queued."""
        near = not self._allowance.affords(SYNC_STEPS * self.ledger.hours_of(self._pace.step or math.inf))
        if near and trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
