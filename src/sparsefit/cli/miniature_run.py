"""A miniature of a recipe's run, in a process of its own: a model of a few blocks with random weights, a few batches.

It goes through the same Trainer, callbacks and files as the run itself, so that what it takes is what a block takes.
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

from sparsefit.callbacks import BlockwiseReconstruction, GPUHourBudget, RunReport, SparseCheckpoints, WandaPruning
from sparsefit.callbacks.zero_shot_tasks import LEDGER_STAGE, METRIC
from sparsefit.cli.fit import checkpoints_of_run
from sparsefit.cli.library_output import silence_libraries
from sparsefit.cli.miniature_measures import Watch, bits_of
from sparsefit.errors import SparsefitError
from sparsefit.evaluation.zero_shot import Results
from sparsefit.planning import Measured
from sparsefit.reporting.machine import memory_held

STEPS = 3  # optimizer steps of a miniature run: the first one pays for what happens once


@dataclass(frozen=True)
class Miniature:
    """A recipe, cut down. It is sent to another process, so it holds plain values, tensors and functions by name.

    Args:
        make_module: Makes the module with so many blocks (None: all of them).
        blocks: Of the model.
        pruning: Arguments of `WandaPruning`.
        reconstruction: Arguments of `BlockwiseReconstruction`.
        trainer: Arguments of `Trainer`.
        calibration: Calibration batches.
        samples: How many calibration samples they hold.
        train: A training batch; None where the recipe trains nothing.
        test: A test batch; None where it has no test data.
        val: A validation batch; None where it validates on nothing.
        tasks: Of the zero-shot tasks, arguments of `RunReport`.
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
    """What a miniature run takes, and after it another one that is only pruned; both in one new process.

    Raises:
        SparsefitError: if it fails; says why.
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
            f"the miniature run of {run.blocks or 'all'} blocks was killed (status {process.exitcode}): they may not "
            "fit into the memory"
        )
    process.join()
    if isinstance(found, BaseException):
        raise SparsefitError(f"the recipe fails on a miniature of its model: {found}") from found
    return found


def _in_child(runs: list[Miniature], sender: Connection) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # what the run itself says is of no interest
        os.dup2(silent, output)
    silence_libraries()
    try:
        sender.send([_measured(run) for run in runs])
    except Exception as error:  # whatever it is, it is the recipe's
        sender.send(SparsefitError(f"{type(error).__name__}: {error}"))


def _measured(run: Miniature) -> Measured:
    held = memory_held()
    module, watch = run.make_module(run.blocks), Watch(held)
    evaluations = _timed(module)
    with tempfile.TemporaryDirectory() as folder:
        budget = GPUHourBudget(1e6, drive_learning_rate=False)
        pruning, report = WandaPruning(**run.pruning), RunReport(f"{folder}/run", **_few_items(run.tasks))
        others = [BlockwiseReconstruction(**run.reconstruction), SparseCheckpoints(f"{folder}/run"), budget]
        others += checkpoints_of_run(Path(folder, "run"))
        trainer = Trainer(
            **run.trainer,
            callbacks=[watch, pruning, report, *others],
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
        "pruned": float(bits_of(pruning.masks)),
        "train": float(sum(p.numel() for p in module.parameters() if p.requires_grad and run.train is not None)),
    }
    seconds |= watch.seconds()
    tasks: dict[str, Results] = report.report.get("tasks", {})
    if items := sum(result["items"] for results in tasks.values() for result in results.values()):
        seconds["task item"] = spent[LEDGER_STAGE] / items
    return Measured(run.blocks or 1, run.samples, count, seconds, watch.peaks, watch.tensors, counts, disk, len(tasks))


def _few_items(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """One batch of each task's items."""
    return {**tasks, "tasks_limit": tasks["tasks_batch_size"]} if tasks else {}


def _timed(module: LightningModule) -> list[float]:
    """The seconds of each evaluation to come, where the module evaluates itself; the shortest was not disturbed."""
    evaluate, taken = getattr(module, "evaluate", None), []
    if callable(evaluate):

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            figures = evaluate(*args, **kwargs)
            taken.append(time.monotonic() - start)
            return figures

        module.evaluate = timed
    return taken


class Batches(LightningDataModule):
    """The batches of a miniature, again and again."""

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
