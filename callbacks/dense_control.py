"""`DenseControl`: trains the dense model like the pruned one, to tell recovery from the effect of further training."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from sparsefit.callbacks.divergence import DivergenceGuard
from sparsefit.callbacks.random_states import RandomStates, random_states, set_random_states
from sparsefit.callbacks.run_report import RunReport
from sparsefit.callbacks.trainer_lookup import budget_of, ledger_of, masks_of
from sparsefit.errors import ConfigError, MaskError
from sparsefit.reporting.console import console, control_summary, stage_progress
from sparsefit.reporting.report import distance_from_control, metrics


class DenseControl(Callback):
    """Turns a fit into the control experiment of a finished run, and adds it to that run's report.

    The control is the dense model, trained without pruning by the same recipe: a new module with the same settings, the
    same data from the start, the random states and learning rates of the run, and the same number of optimizer steps.
    If recovery beats the dense model because the training text is new to both, the control does so, too; the difference
    between the two is the cost of the masks. A learning rate chosen for the pruned model can make the control worse
    than the dense model. The report then says so and compares recovery with the dense model instead.

    ```python
    report = RunReport("runs/mine")
    Trainer(callbacks=[WandaPruning(0.5), report], **settings).fit(MyModule(), MyData())
    Trainer(callbacks=[DenseControl(report)], **settings).fit(MyModule(), MyData())
    ```

    A module with `distill` is trained on the labels alone, as a dense model cannot learn from itself. Blocks are not
    reconstructed, and the base is not quantized. No weights are saved: an interrupted control starts again from the
    beginning. The files of the run are complete by then and are not changed.

    Args:
        report: The `RunReport` of the run, which has ended in this process.

    Raises:
        ConfigError: in `setup`, if there is no such run, its learning rates are not known from the start, the trainer
            prunes or has a budget, or the module is pruned.
    """

    def __init__(self, report: RunReport) -> None:
        self.report = report
        self.training_record = report.training_record
        self._shown = ExitStack()
        self._advance: Any = None
        self._after_batch: RandomStates | None = None
        self._account: dict[str, Any] = {}
        self._guard = DivergenceGuard()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that this fit can be a control, and remove the teacher."""
        if stage != TrainerFn.FITTING:
            return
        self._check(trainer, pl_module)
        if trainer.is_global_zero:
            self.report.folder.lock(resuming=True)
        ledger_of(trainer)
        taught = getattr(pl_module, "distill", None) is not None
        if taught:
            pl_module.distill = None
        self._account = {"status": "running", "steps": 0, "without_teacher": taught}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random states that the run had at this hook."""
        self.training_record.set_random("fit")
        self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random states that the run had at this hook, and show the progress."""
        self.training_record.set_random("training")
        if trainer.progress_bar_callback is None:
            shown = stage_progress(
                "training the dense control", self.training_record.steps, visible=trainer.is_global_zero
            )
            self._advance = self._shown.enter_context(shown)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Pass the loss to the divergence guard, which stops the fit if it is not finite."""
        self._guard.on_before_backward(trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Set the learning rates of the run, and stop if these rates make the dense model diverge."""
        self._guard.on_before_optimizer_step(trainer, pl_module, optimizer)
        self.training_record.set_rates(trainer.global_step, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Stop after as many steps as the run took."""
        self._after_batch = random_states()
        if self._advance is not None and (new := trainer.global_step - self._account["steps"]):
            self._advance(new)
        self._account["steps"] = trainer.global_step
        if trainer.global_step >= self.training_record.steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random states of training, as in the run."""
        if not trainer.sanity_checking and self._after_batch is not None:
            set_random_states(self._after_batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the control and add it to the report."""
        self._shown.close()
        figures = self.report.measure(trainer, pl_module, "control")
        for metric, value in figures.items():
            self.report.report.setdefault(metric, {})["control"] = value
        distances = {name: distance_from_control(self.report.report, name) for name in metrics(self.report.report)}
        self._account["distance"] = {name: value for name, value in distances.items() if value is not None}
        self._account["status"] = "finished"
        self._write(trainer)
        if trainer.is_global_zero:
            console.print(control_summary(self.report.report))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the lock on the run folder."""
        self.report.folder.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report how far the control came; the files of the run are not changed."""
        self._shown.close()
        if self._account:
            self._account["status"] = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
            self._account["error"] = f"{type(exception).__name__}: {exception}"
            self._write(trainer)
        self.report.folder.release()

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.training_record.steps:
            raise ConfigError(
                "there is no training to be a control of: fit with this RunReport first, in this process, for at least "
                "one step"
            )
        if not self.training_record.whole:
            raise ConfigError(
                "the run was resumed from a checkpoint of an earlier version, which does not hold its learning rates, "
                "so a control cannot use the same ones. Start the run again, or leave the control out"
            )
        if masks_of(trainer) is not None or any(hasattr(callback, "masks") for callback in trainer.callbacks):
            raise ConfigError("a control is not pruned: leave WandaPruning out of the callbacks of its trainer")
        if budget_of(trainer) is not None:
            raise ConfigError(
                "a control takes as many steps as its run, whatever they cost: leave GPUHourBudget out of the "
                "callbacks of its trainer"
            )
        if self.training_record.masks is None or not self.training_record.masks.sparsity:
            return
        try:
            self.training_record.masks.verify(module)
        except MaskError:  # weights pruned in the run are non-zero here, so the module is dense
            return
        raise ConfigError("the module is pruned already: a control needs a new, dense one with the same settings")

    def _write(self, trainer: Trainer) -> None:
        ledger = ledger_of(trainer)
        hours = ledger.hours
        self._account |= {"gpu_hours": hours, "seconds": ledger.seconds_of(hours)}
        self.report.report["control"] = dict(self._account)
        if trainer.is_global_zero:
            self.report.write()
