"""A miniature of a recipe's run, in a process of its own: a model of a few blocks with random weights, a few batches.

It goes through the same Trainer, callbacks and files as the run itself, so that what it takes is what a block takes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from sparsefit.callbacks import BlockwiseReconstruction, GPUHourBudget, RunReport, SparseCheckpoints, WandaPruning
from sparsefit.callbacks.hooks import PrunedRunCallback
from sparsefit.cli.fit import checkpoints_of_run
from sparsefit.cli.quiet import quieten
from sparsefit.errors import SparsefitError
from sparsefit.planning import Measured
from sparsefit.pruning import MaskSet
from sparsefit.reporting.machine import memory_held, peak_memory, reset_peak_memory

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
    quieten()
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
        pruning, report = WandaPruning(**run.pruning), RunReport(f"{folder}/run")
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
    count = max((len(report.report.get(metric, {})) for metric in report.report["metrics"]), default=0)
    if count:
        seconds["evaluation"] = min(evaluations, default=spent.get("evaluation", 0.0) / count)
    counts = {
        "all": float(sum(p.numel() for p in module.parameters())),
        "pruned": float(_bits(pruning.masks)),
        "train": float(sum(p.numel() for p in module.parameters() if p.requires_grad)),
    }
    seconds |= watch.seconds()
    return Measured(run.blocks or 1, run.samples, count, seconds, watch.peaks, watch.tensors, counts, disk)


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


class Watch(PrunedRunCallback):
    """Takes the times of the batches and updates of a fit, and the most memory of its stages."""

    def __init__(self, held: float) -> None:
        self._held = held
        self.peaks: dict[str, float] = {}
        self.tensors: dict[str, float] = {}
        self._saved: SavedActivations | None = None
        self._batches: list[float] = []
        self._updates: list[float] = []
        self._mark = 0.0

    def seconds(self) -> dict[str, float]:
        """Of a training batch and of an update: the shortest, which nothing disturbed."""
        return {"batch": min(self._batches), "update": min(self._updates)} if self._batches else {}

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        reset_peak_memory()

    def on_base_ready(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Pruning and reconstruction are over."""
        self.tensors["pruning"] = sum(map(_bytes, pl_module.parameters())) + _bits(masks) / 8
        self._take_peak("pruning")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch begins; of the first one the activations are counted."""
        if batch_idx == 0:
            self._saved = SavedActivations(pl_module)
            self._saved.__enter__()
        self._mark = _now(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """What a backward pass needs is there."""
        if self._saved is not None and self._saved.counting:
            self._saved.__exit__(None, None, None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Its gradients are there."""
        self._batches.append(_now(trainer) - self._mark)
        self._mark = _now(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Its step is taken."""
        self._updates.append(_now(trainer) - self._mark)

    def on_closing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over."""
        held = [p for p in pl_module.parameters() if p.requires_grad]  # as many bytes of gradients
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        held += [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
        activations = 0.0 if self._saved is None else self._saved.bytes
        self.tensors["training"] = self.tensors["pruning"] + sum(map(_bytes, held)) + activations
        self._take_peak("training")

    def _take_peak(self, stage: str) -> None:
        self.peaks[stage] = float(peak_memory()[0] or 0) - self._held
        reset_peak_memory()


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what autograd keeps for a backward pass, each memory once, the model's own left out."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__(self._count, lambda tensor: tensor)
        self._seen = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.bytes, self.counting = 0.0, True

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __exit__(self, *error: Any) -> None:
        """The forward pass is over."""
        self.counting = False
        super().__exit__(*error)


def _bits(masks: MaskSet) -> int:
    return sum(weights for weights, _ in masks.counts().values())


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


def _now(trainer: Trainer) -> float:
    """Seconds, when all that the device was given is done."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.monotonic()
