"""The trainings of a study: of the dense model, and of pruned models with fixed masks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from sparsefit.callbacks import GPUHourBudget, WandaPruning
from sparsefit.cli.library_output import interrupts
from sparsefit.cli.study_data import StudyData
from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.finite_checks import check_finite_weights
from sparsefit.settings import number
from sparsefit.study import Point

NewTrainer = Callable[..., Trainer]
_NO_LIMIT = 1e6  # GPU-hours, so many that the learning rate depends only on the steps


@dataclass(frozen=True)
class TrainingSettings:
    """A training within a study. The learning rate falls linearly to zero at its end.

    Args:
        epochs: Epochs of the training data; 0 trains nothing.
        learning_rate: Learning rate of all parameter groups; None keeps that of the module's optimizer.
        warmup_steps: Optimizer steps in which the rate rises.
    """

    epochs: int = 0
    learning_rate: float | None = None
    warmup_steps: int = 5

    def __post_init__(self) -> None:
        number("epochs", self.epochs, least=0, whole=True)
        number("warmup_steps", self.warmup_steps, least=0, whole=True)
        if self.learning_rate is not None:
            number("learning_rate", self.learning_rate, above=0)


@dataclass(frozen=True)
class FinetuningSettings(TrainingSettings):
    """Fine-tuning of the pruned models of all or some grid points. The rate falls linearly to zero at its end.

    Args:
        epochs: Epochs of the training data; 0 trains nothing.
        learning_rate: Learning rate of all parameter groups; None keeps that of the module's optimizer.
        warmup_steps: Optimizer steps in which the rate rises.
        sparsities: Fine-tune only points with these sparsities; a pattern's is its share of zeros. None: all.
        scores: Fine-tune only points with these scores; None: all.
        granularities: Fine-tune only points with these granularities, and patterns; None: all.
        seeds: Number of seeds with which each point is fine-tuned: seed_everything and the numbers after it. They
            determine the order of the training data and all other random numbers. The pruned model is always that of
            the first calibration seed.
    """

    sparsities: list[float] | None = None
    scores: list[str] | None = None
    granularities: list[str] | None = None
    seeds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ConfigError(f"finetuning.seeds is {self.seeds}: it must be at least 1")

    def check(self, points: Iterable[Point]) -> None:
        """Check that some grid point is fine-tuned.

        Raises:
            ConfigError: if none is.
        """
        if self.epochs and not any(map(self.takes, points)):
            raise ConfigError(
                f"finetuning selects no point of the grid (sparsities {self.sparsities}, scores {self.scores}, "
                f"granularities {self.granularities}): give values of the grid, with granularities named as in the "
                "results, or leave them out"
            )

    def takes(self, point: Point) -> bool:
        """Whether a point is fine-tuned."""
        wanted = {"sparsity": self.sparsities, "score": self.scores}
        if not point.key["pattern"]:
            wanted["granularity"] = self.granularities
        return all(values is None or point.key[axis] in values for axis, values in wanted.items())


class StartRate(Callback):
    """Sets the initial learning rate of the optimizers."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the rate before the first step."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate


def trained_dense(
    module: LightningModule,
    file: Path,
    data: LightningDataModule,
    settings: TrainingSettings,
    new_trainer: NewTrainer,
    seed: int,
) -> dict[str, Any] | None:
    """Train a module from its current weights, or load the weights of the study's earlier training.

    Returns:
        The epochs and seconds of the training; None if there was none now.

    Raises:
        RunFolderError: if the file is damaged.
        DivergenceError: if the model has diverged.
    """
    if settings.epochs == 0:
        return None
    if file.exists():
        try:
            load_model(module, file)
        except (SafetensorError, RuntimeError) as error:
            raise RunFolderError(
                f"{file} is damaged ({error}): give the study another folder, or restore the file"
            ) from error
        return None
    seconds = _fit(module, data, settings, new_trainer, seed, [])
    check_finite_weights(module, "the trained dense model")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    save_model(module, str(partial))
    partial.replace(file)
    return {"epochs": settings.epochs, "seconds": seconds}


def finetune(
    data: StudyData,
    settings: TrainingSettings,
    new_trainer: NewTrainer,
    device: torch.device,
    module: LightningModule,
    masks: MaskSet,
    seed: int,
) -> None:
    """Train a pruned module with fixed masks."""
    pruned = WandaPruning()
    pruned.masks = masks
    with data.seeded(seed):
        _fit(module, data.data, settings, new_trainer, seed, [pruned])
    module.to(device)


def _fit(
    module: LightningModule,
    data: LightningDataModule,
    settings: TrainingSettings,
    new_trainer: NewTrainer,
    seed: int,
    callbacks: list[Callback],
) -> float:
    """Train, and return the seconds."""
    start = time.perf_counter()
    seed_everything(seed, verbose=False)
    rate = [] if settings.learning_rate is None else [StartRate(settings.learning_rate)]
    budget = GPUHourBudget(_NO_LIMIT, settings.warmup_steps)
    module.train()
    trainer = new_trainer(max_epochs=settings.epochs, callbacks=[*rate, *callbacks, budget])
    with interrupts():
        trainer.fit(module, datamodule=data)
    return time.perf_counter() - start
