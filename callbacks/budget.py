"""`GPUHourBudget`: ends a run with a trained model when its GPU-hours are spent."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from sparsefit.callbacks.training_length import last_steps, steps_done_here
from sparsefit.errors import BudgetError, ConfigError
from sparsefit.planning import pace_line
from sparsefit.recovery.ledger import GPUHourLedger, check_split
from sparsefit.recovery.schedule import budget_factor, first_rate, keep_base_rates, set_rates
from sparsefit.recovery.step_times import StepTimes, estimate_validation
from sparsefit.settings import named_settings, number

SYNC_STEPS = 20  # this many steps before the end, the GPU is synchronized before the clock is read
PACE_AFTER = 5  # the time per step is logged after this many steps of a fit


@named_settings
class GPUHourBudget(Callback):
    """Stops training so that the whole run, from its first hook to its export, fits in a number of GPU-hours.

    Wall time x devices is charged from `setup` on, including calibration, pruning, sanity check and validation. The
    charge is saved in checkpoints, and a resumed run continues from it. Training stops, on all ranks at the same step,
    when one more step (the longest of the last 10) would not leave the reserve and the time of the validation that
    Lightning runs on stopping. During training, the learning rate rises for `warmup_steps` and then falls linearly to
    zero as the budget or `max_steps` (or `max_epochs`, if the data have a length) runs out, whichever comes first
    (Budgeted Training, https://arxiv.org/abs/1905.04753).

    The rate is set before each optimizer step from the initial rate of each parameter group ("initial_lr"). A module
    with learning rate schedulers of its own keeps them, with a warning. Resuming with more `gpu_hours` extends the run;
    the rate then rises to the value for the longer budget. One callback is one budget: a second `fit` with it continues
    to count. `Trainer(min_steps=..., min_epochs=...)` would train beyond the budget and is refused.

    A `split` divides what is left after calibration and pruning, without what is kept for the closing evaluation and
    export. A stage before training asks for its share with `share_of`; training, with its validations, gets everything
    that these stages leave.

    Args:
        gpu_hours: The budget: hours of wall time x devices, on all nodes together.
        warmup_steps: Optimizer steps in which the learning rate rises linearly to its full value.
        reserve: Minimum share of the budget that is kept for the final evaluation and export; `keep` can raise it.
        drive_learning_rate: Whether to set the learning rate.
        split: Shares that add up to 1: `{reconstruction: 0.2, training: 0.8}`.

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
        self.gpu_hours = float(number("gpu_hours", gpu_hours, above=0))
        self.warmup_steps: int = number("warmup_steps", warmup_steps, least=0, whole=True)
        self.reserve = float(number("reserve, a share of the budget,", reserve, least=0, below=1))
        self.drive_learning_rate = drive_learning_rate
        self.split = None if split is None else check_split(split)
        self.ledger = GPUHourLedger(self.gpu_hours, self.split)
        self.stop_reason: str | None = None  # None unless the budget has ended training
        self._kept: dict[str, float] = {}  # wall seconds of this rank that are kept for after training
        self._step_times = StepTimes()
        self._sanity_marks: list[float] = []
        self._training_start: float | None = None  # GPU-hours
        self._drives = False
        self._steps_seen = 0  # in this fit
        self._steps: tuple[float, float] = math.inf, math.inf  # last step by max_steps and by max_epochs
        self._other_devices = False  # whether the checkpoint is from another number of devices
        self._more_steps = 0  # extra steps, compared to a run on the current number of devices from its start
        self._factor: tuple[int, float] | None = None  # the step, and the factor of the base rates at this step

    def keep(self, seconds: float, what: str = "closing") -> None:
        """Keep at least this much time for what follows training.

        Args:
            seconds: Wall seconds, measured or estimated; the maximum over ranks counts.
            what: Name of the entry. Entries of different names add up; the same name again replaces its entry.
        """
        self._kept[what] = float(number(f"what is kept for {what}, in seconds,", seconds, least=0))

    def check_before(self, trainer: Trainer, what: str, seconds: float = 0.0) -> None:
        """Raise unless the budget can pay for what comes next. Collective: either all ranks raise or none.

        Args:
            trainer: The trainer of the run.
            what: What the budget must pay for, as the message names it: "calibration".
            seconds: Wall seconds that it will take, if known.

        Raises:
            BudgetError: If nothing, or less than `seconds`, is left without the reserve.
        """
        if refusal := self._refusal(trainer, what, seconds):
            raise BudgetError(refusal)

    def share_of(self, trainer: Trainer, stage: str) -> float:
        """Wall seconds that a stage may take from now on. Collective: all ranks get the same value.

        A stage that asks again gets what is left of its share. If the budget is spent, this returns 0 with a warning
        instead of an error, because the pruned model must still be saved. Without a split, returns all that is left.

        Args:
            trainer: The trainer of the run.
            stage: "reconstruction", or "training", which may take all that is left; other names raise a ConfigError.
        """
        if refusal := self._refusal(trainer, stage):
            rank_zero_warn(f"GPUHourBudget: {refusal}")
        return self.ledger.share(stage)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock, in the first hook of the fit."""
        if stage != TrainerFn.FITTING:
            return
        if trainer.min_steps or trainer.min_epochs:
            raise ConfigError(
                "Trainer(min_steps=..., min_epochs=...) keeps Lightning from stopping when the GPU-hours are spent. "
                "Leave both unset, or leave GPUHourBudget out."
            )
        self.stop_reason = None
        self.ledger.switch("setup")
        self.ledger.start(trainer.world_size)  # no effect if another callback's `setup` did so through `ledger_of`

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the base learning rates before a checkpoint restores rates that have already decayed."""
        self._drives = self.drive_learning_rate and not trainer.lr_scheduler_configs
        if self._drives:
            keep_base_rates(trainer.optimizers)
        elif self.drive_learning_rate:
            rank_zero_warn(
                "GPUHourBudget leaves the learning rate to the module's own scheduler, which does not know when the "
                "budget ends. Return no scheduler from configure_optimizers to let the budget drive the rate."
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Charge the sanity check to validation."""
        self.ledger.switch("validation")
        self._sanity_marks = [self.ledger.clock()]

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Record the end time of each batch of the sanity check."""
        if trainer.sanity_checking:
            self._sanity_marks.append(self.ledger.clock())

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the time of a whole validation from the sanity check."""
        self.ledger.switch("setup")
        self._sanity_marks.append(self.ledger.clock())
        self._step_times.validation_estimate = estimate_validation(self._sanity_marks, sum(trainer.num_val_batches))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the training part of the budget; if nothing is left, stop before the first step."""
        self.ledger.switch("training")
        self._agree(trainer)
        resumed = self._training_start is not None
        if not resumed:
            self._training_start = self.ledger.spent
        self._step_times.start(self._now, trainer.global_step)
        self._steps_seen = 0
        self._factor = None  # discard the factor of an earlier fit
        # With manual optimization the module decides when to step, so epochs do not tell the number of steps.
        self._steps = last_steps(trainer, of_epochs=pl_module.automatic_optimization)
        if self._other_devices and self._steps[1] < math.inf:
            self._more_steps = trainer.global_step - steps_done_here(trainer)
        self._other_devices = False
        self._check_warm_up()
        self._stop_if_spent(trainer, self._step_times.step)
        if self.stop_reason:
            way_out = "to train further" if resumed else "to train, or prune with fewer or shorter calibration samples"
            rank_zero_warn(f"GPUHourBudget: no training step is taken: {self.stop_reason}. Raise gpu_hours {way_out}.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate at the first batch of each optimizer step."""
        if not self._drives or self._training_start is None:
            return
        step, ledger = trainer.global_step, self.ledger
        keep_base_rates(trainer.optimizers, self._factor and self._factor[1])  # of groups added since
        if self._factor is None or self._factor[0] != step:
            whole = ledger.limit - self._training_start
            done = (ledger.spent - self._training_start) / whole if whole > 0 else 1.0
            # The first step has progress 0 whatever the clock says, also in a run resumed before its first step.
            of_steps, of_epochs = self._steps
            done = max(done, step / of_steps, (step - self._more_steps) / of_epochs) if step else 0.0
            self._factor = step, budget_factor(step, self.warmup_steps, done)
        set_rates(trainer.optimizers, self._factor[1])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Agree over ranks on what is spent, and stop if the next step does not fit."""
        self._await_device(trainer)
        if self._step_times.batch_ended(self._now, trainer.global_step):
            self._stop_if_spent(trainer, self._step_times.step)
            self._log_pace(trainer)
        if not trainer.barebones:
            rate = first_rate(trainer.optimizers)
            figures = {"gpu_hours": self.ledger.spent} | ({} if rate is None else {"learning_rate": rate})
            pl_module.log_dict(figures, on_step=True, on_epoch=False, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Charge validation to its own stage."""
        if self.ledger.running:
            self.ledger.switch("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the validation, and stop if another step and another validation do not fit."""
        if not self.ledger.running or trainer.sanity_checking:
            return
        self._step_times.validation_ended(self._now)
        self._agree(trainer)
        self.ledger.switch("training")
        self._stop_if_spent(trainer, self._step_times.step)

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
        """What is spent so far and what a resumed run needs: plain numbers, strings, lists and dicts."""
        return {
            "ledger": self.ledger.state_dict(),
            "training_start": self._training_start,
            "devices": self.ledger.devices,
            "more_steps": self._more_steps,
            "pace": self._step_times.state_dict(),
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the charge of a checkpoint; works before and after `on_fit_start`."""
        self.ledger.load_state_dict(state_dict["ledger"])
        self._training_start = state_dict["training_start"]
        then, now = state_dict.get("devices", self.ledger.devices), self.ledger.devices
        self._other_devices, self._more_steps = then != now, state_dict.get("more_steps", 0)
        self._step_times.load_state_dict(state_dict["pace"], slower=None if then == now else max(1.0, then / now))
        self._kept = {**state_dict["kept"], **self._kept}

    @property
    def _now(self) -> float:
        """GPU-hours of the run, as wall seconds on the current number of devices."""
        return self.ledger.seconds_of(self.ledger.hours)

    def _agree(self, trainer: Trainer, seconds: float = 0.0) -> float:
        """All-reduce the spent hours, the reserve and `seconds` to their maxima over ranks; returns that of
        `seconds`."""
        spent, reserved = self.ledger.hours, self._reserved(trainer)
        if trainer.world_size > 1:
            mine = torch.tensor([spent, reserved, seconds], dtype=torch.float64, device=trainer.strategy.root_device)
            spent, reserved, seconds = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self.ledger.agree(spent, self.gpu_hours - reserved)
        return seconds

    def _reserved(self, trainer: Trainer) -> float:
        """GPU-hours that training must leave: the reserve, and the validation that Lightning runs on stopping."""
        kept = max(self.reserve * self.gpu_hours, self.ledger.hours_of(sum(self._kept.values())))
        epochs = trainer.check_val_every_n_epoch or 1
        validates = trainer.enable_validation and (trainer.current_epoch + 1) % epochs == 0
        return kept + self.ledger.hours_of(self._step_times.validation if validates else 0.0)

    def _stop_if_spent(self, trainer: Trainer, seconds: float) -> None:
        """Stop unless this many more seconds fit. Collective."""
        seconds, ledger = self._agree(trainer, seconds), self.ledger
        if ledger.affords(seconds):
            return
        trainer.should_stop = True
        if self.stop_reason is None:
            needed = ledger.hours_of(seconds)
            self.stop_reason = (
                f"{ledger.spent:.4g} of {self.gpu_hours:.4g} GPU-hours are spent after {trainer.global_step} steps, "
                f"{self.gpu_hours - ledger.limit:.4g} are kept for the closing validation, evaluation and export"
                + (f", and the next step may take {needed:.4g}" if needed else "")
            )
            rank_zero_info(f"GPUHourBudget: stopping: {self.stop_reason}.")

    def _log_pace(self, trainer: Trainer) -> None:
        """Log once per fit how many steps the rest of the budget pays for, from the median time of a step."""
        self._steps_seen += 1
        by_steps, by_epochs = self._steps
        to_come = min(by_steps, by_epochs + self._more_steps) - trainer.global_step
        if self._steps_seen == PACE_AFTER and to_come > 0 and not trainer.should_stop:
            rank_zero_info(pace_line(self._step_times.usual_step, self.ledger.left, self.gpu_hours, to_come))

    def _refusal(self, trainer: Trainer, what: str, seconds: float = 0.0) -> str | None:
        """Why `what` cannot be paid for and what to change; None if it can. Collective."""
        seconds, ledger = self._agree(trainer, seconds), self.ledger
        if ledger.affords(seconds):
            return None
        estimate = f", and {what} needs about {ledger.hours_of(seconds):.4g} more" if seconds else ""
        return (
            f"The budget of {self.gpu_hours:.4g} GPU-hours cannot pay for {what}: {ledger.spent:.4g} are spent "
            f"and {self.gpu_hours - ledger.limit:.4g} are kept for the final evaluation and export{estimate}. "
            "Raise gpu_hours, take fewer calibration samples, or make them shorter."
        )

    def _check_warm_up(self) -> None:
        by_steps, by_epochs = self._steps
        steps = min(by_steps, by_epochs + self._more_steps)
        if self._drives and 0 < steps < self.warmup_steps:
            rank_zero_warn(
                f"GPUHourBudget: warmup_steps is {self.warmup_steps} and training ends after {steps} "
                "steps, before the learning rate has reached its full value. Set fewer warmup_steps"
            )

    def _await_device(self, trainer: Trainer) -> None:
        """Close to the end, wait for queued GPU work before the clock is read."""
        near = not self.ledger.affords(SYNC_STEPS * (self._step_times.step or math.inf))
        if near and trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
