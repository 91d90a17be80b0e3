"""A miniature of a recipe's run: a model of a few blocks with random weights and a few batches, in its own process.

It uses the same Trainer, callbacks and files as the run itself, so its cost per block is that of the run.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from sparsefit.calibration.samples import cut_batch
from sparsefit.callbacks import BlockwiseReconstruction, GPUHourBudget, RunReport, SparseCheckpoints, WandaPruning
from sparsefit.callbacks.zero_shot_tasks import LEDGER_STAGE, METRIC
from sparsefit.cli.fit import checkpoints_of_run
from sparsefit.cli.library_output import silence_libraries
from sparsefit.cli.miniature_measures import MiniatureMeasures, masked_weights
from sparsefit.errors import SparsefitError
from sparsefit.evaluation.zero_shot import Results
from sparsefit.machine import memory_held
from sparsefit.planning import Measured

STEPS = 3  # optimizer steps of a miniature run; the first includes one-time costs


@dataclass(frozen=True)
class Miniature:
    """A reduced recipe. It is sent to another process, so it holds plain values, tensors and functions by name.

    Args:
        make_module: Makes the module with a number of blocks (None: all of them).
        blocks: How many blocks the model has.
        pruning: Arguments of `WandaPruning`.
        reconstruction: Arguments of `BlockwiseReconstruction`.
        trainer: Arguments of `Trainer`.
        calibration: Calibration batches.
        samples: How many calibration samples they hold.
        train: A training batch; None if the recipe trains nothing.
        test: A test batch; None if it has no test data.
        val: A validation batch; None if it has no validation data.
        tasks: Arguments of `RunReport` for the zero-shot tasks.
    """

    make_module: Callable[[int | None], LightningModule]
    blocks: int | None
    pruning: Mapping[str, Any]
    reconstruction: Mapping[str, Any]
    trainer: Mapping[str, Any]
    calibration: list[Any]
    samples: int
    train: Any = None
    test: Any = None
    val: Any = None
    tasks: Mapping[str, Any] = field(default_factory=dict)


def measure(run: Miniature, more: Miniature | None = None) -> list[Measured]:
    """Measure a miniature, and optionally one that is only pruned, in a new process.

    Raises:
        SparsefitError: if a run fails; with the reason.
    """
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_in_child, args=([run, *([more] if more else [])], sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        found = SparsefitError(
            f"the miniature run of {run.blocks or 'all'} blocks was killed (status {process.exitcode}): perhaps "
            "it does not fit into memory"
        )
    process.join()
    if isinstance(found, BaseException):
        raise SparsefitError(f"the recipe fails on a miniature of its model: {found}") from found
    return found


def _in_child(runs: list[Miniature], sender: Connection) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # the output of the run is not needed
        os.dup2(silent, output)
    silence_libraries()
    try:
        sender.send([_measure(run) for run in runs])
    except Exception as error:  # any error comes from the recipe
        sender.send(SparsefitError(f"{type(error).__name__}: {error}"))


def _measure(run: Miniature) -> Measured:
    held = memory_held()
    sample = cut_batch(run.calibration[0], 1) if run.pruning.get("allocation") == "fisher" else None
    module, measures = run.make_module(run.blocks), MiniatureMeasures(held, sample)
    evaluations = _time_evaluations(module)
    with tempfile.TemporaryDirectory() as folder:
        budget = GPUHourBudget(1e6, drive_learning_rate=False)
        pruning, report = WandaPruning(**run.pruning), RunReport(f"{folder}/run", **_few_items(run.tasks))
        others = [BlockwiseReconstruction(**run.reconstruction), SparseCheckpoints(f"{folder}/run"), budget]
        others += checkpoints_of_run(Path(folder, "run"))
        trainer = Trainer(
            **run.trainer,
            callbacks=[measures, pruning, report, *others],
            default_root_dir=folder,
            max_steps=STEPS if run.train is not None else 0,
            max_epochs=-1,
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=Batches(run))
        spent = budget.ledger.seconds
        files = [file for file in Path(folder, "run").rglob("*") if file.is_file()]
        disk = float(sum(file.stat().st_size for file in files))
    seconds = {"pruning": spent.get("calibration and pruning", 0.0), "export": spent.get("export", 0.0)}
    if "reconstruction" in spent:
        seconds["reconstruction"] = spent["reconstruction"]
    count = max((len(report.report.get(metric, {})) for metric in {*report.report["metrics"]} - {METRIC}), default=0)
    if count:
        seconds["evaluation"] = min(evaluations, default=spent.get("evaluation", 0.0) / count)
    counts = {
        "all": float(sum(p.numel() for p in module.parameters())),
        "pruned": float(masked_weights(pruning.masks)),
        "train": float(sum(p.numel() for p in module.parameters() if p.requires_grad and run.train is not None)),
    }
    seconds |= measures.seconds()
    tasks: dict[str, Results] = report.report.get("tasks", {})
    if items := sum(result["items"] for results in tasks.values() for result in results.values()):
        seconds["task item"] = spent[LEDGER_STAGE] / items
    memory = measures.peaks, measures.tensors
    return Measured(run.blocks or 1, run.samples, count, seconds, *memory, counts, disk, len(tasks))


def _few_items(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the tasks, limited to one batch of items each."""
    return {**tasks, "tasks_limit": tasks["tasks_batch_size"]} if tasks else {}


def _time_evaluations(module: LightningModule) -> list[float]:
    """Record the times of later evaluations in the returned list, if the module has `evaluate`; the shortest counts."""
    evaluate, taken = getattr(module, "evaluate", None), []
    if callable(evaluate):

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            metrics = evaluate(*args, **kwargs)
            taken.append(time.monotonic() - start)
            return metrics

        module.evaluate = timed
    return taken


class Batches(LightningDataModule):
    """The batches of a miniature; the training batch is repeated."""

    def __init__(self, run: Miniature) -> None:
        super().__init__()
        self._run = run

    def calibration_dataloader(self) -> list[Any]:
        """The calibration batches."""
        return self._run.calibration

    def train_dataloader(self) -> DataLoader:
        """The training batch, once for each step."""
        return DataLoader([self._run.train] * STEPS, batch_size=None)

    def test_dataloader(self) -> DataLoader | list[Any]:
        """The test batch."""
        return [] if self._run.test is None else DataLoader([self._run.test], batch_size=None)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """The validation batch."""
        return [] if self._run.val is None else DataLoader([self._run.val], batch_size=None)
