"""`sparsefit fit` and `sparsefit prune` run a recipe in YAML with LightningCLI."""

from __future__ import annotations

import gc
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from sparsefit.callbacks import (
    AtomicCheckpointIO,
    BlockwiseReconstruction,
    DenseControl,
    GPUHourBudget,
    QuantizedBase,
    RunReport,
    SparseCheckpoints,
    WandaPruning,
)
from sparsefit.callbacks.loggers import end_loggers, loggers_of_run
from sparsefit.callbacks.run_folder import LOGS, RunFolder
from sparsefit.cli.class_paths import check_class_paths
from sparsefit.cli.input_errors import (
    PlainErrors,
    check_recipes,
    check_section,
    check_seed,
    check_trainer,
    trainer_errors,
)
from sparsefit.cli.library_output import clear_write_errors, interrupts, silence_libraries
from sparsefit.cli.model_data_checks import check_data
from sparsefit.cli.resuming import (
    check_checkpoint,
    is_complete,
    move_paths,
    moved_run,
    named_checkpoint,
    resuming_arguments,
    split_resume,
)
from sparsefit.reporting.console import console, summary
from sparsefit.reporting.report import read_json

CHECKPOINT_INTERVAL = timedelta(minutes=15)
_SECTIONS = ("trainer", "budget", "run", "pruning", "reconstruction", "quantization")
_ONCE_PER_RUN = (Checkpoint, ProgressBar, ModelSummary, WandaPruning, BlockwiseReconstruction, QuantizedBase)
_ONCE_PER_RUN += (GPUHourBudget, RunReport, SparseCheckpoints)


def fit(arguments: list[str], train: bool) -> int:
    """Run a recipe; `train=False` takes no optimizer step."""
    silence_libraries()
    resumed, arguments = split_resume(arguments)
    if resumed is not None:
        if not arguments and is_complete(resumed):
            console.print(summary(read_json(RunFolder(resumed).json)))
            console.print(f"The run in {resumed} is finished: nothing is left to do.", markup=False, soft_wrap=True)
            return 0
        arguments = resuming_arguments(resumed, arguments)
    check_recipes(arguments)
    SparsefitCLI.resumed = resumed
    with clear_write_errors():
        return _fit(arguments, train)


def _fit(arguments: list[str], train: bool) -> int:
    with interrupts():
        _command(SparsefitCLI, [*arguments, *([] if train else ["--trainer.max_steps=0"])]).train_control()
    return 0


def _command(kind: type[SparsefitCLI], arguments: list[str]) -> SparsefitCLI:
    sys.argv[1:] = ["fit", *arguments]  # where LightningCLI reads its arguments
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=_Parser,
        save_config_callback=_ConfigurationOfRun,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the module has its own
    )


def read_recipe(arguments: list[str]) -> Namespace:
    """Parse and check a recipe without instantiating anything."""
    try:
        _command(_RecipeReader, arguments)
    except _Read as read:
        return read.settings
    raise AssertionError("the recipe was run, not only read")


_CLASSES = (LightningModule, LightningDataModule, Callback, Logger, Profiler, Strategy, Accelerator, CheckpointIO)
_CLASSES += (Precision, ClusterEnvironment, LayerSync, nn.Module, Dataset, Optimizer, LRScheduler)
"""The kinds of classes that a recipe may name. Other importable objects are never called."""


class _Parser(PlainErrors, LightningArgumentParser):
    """A parser whose errors are one sentence."""


class SparsefitCLI(LightningCLI):
    """LightningCLI with a section for each of the project's callbacks."""

    resumed: Path | None = None
    """The run folder of `--resume`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each callback a section of the recipe."""
        parser.add_lightning_class_args(GPUHourBudget, "budget")
        parser.add_lightning_class_args(RunReport, "run")
        parser.add_lightning_class_args(WandaPruning, "pruning")
        parser.add_lightning_class_args(BlockwiseReconstruction, "reconstruction")
        parser.add_lightning_class_args(QuantizedBase, "quantization")
        parser.add_argument(
            "--control",
            type=bool,
            default=False,
            help="Train the dense model with the same recipe afterwards, and report it next to the recovered one; it "
            "does not count towards the budget.",
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Run folder whose run to resume with its own recipe, from its newest checkpoint.",
        )
        parser.set_defaults({"reconstruction.passes": 0, "run.logger": "csv"})  # reconstruction only on request

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check the checkpoint to resume from before anything is loaded."""
        self._parser("fit").prog = "sparsefit fit"  # jsonargparse's own name is "sparsefit [options] fit"
        super().parse_arguments(parser, args)
        check_class_paths(self.config.fit, _CLASSES)
        settings = self.config.fit
        for section in _SECTIONS:
            check_section(section, settings.get(section))
        check_seed(settings.seed_everything)
        check_trainer(settings.trainer)
        if settings.ckpt_path in ("last", "best", "hpc"):
            settings.ckpt_path = str(named_checkpoint(settings.ckpt_path, Path(settings.run.folder)))
        self.resumed_from = path = settings.ckpt_path
        if path is not None:
            check_checkpoint(Path(path))
        if self.resumed is not None:
            self._move(self.resumed)
        elif path is not None:
            self._use_moved_folder(Path(path))
        # LightningCLI would merge the checkpoint's hyperparameters into the recipe, which is complete.
        self.config.fit.ckpt_path = None

    def _use_moved_folder(self, checkpoint: Path) -> None:
        """If the run folder was moved, continue in its new place."""
        new = moved_run(checkpoint, Path(self.config.fit.run.folder), sys.argv[1:])
        if new is not None:
            self._move(new)

    def _move(self, new: Path) -> None:
        settings, old = self.config.fit, Path(self.config.fit.run.folder)
        if old.absolute() == new.absolute():
            return
        # Callbacks and loggers of the recipe may also write to the run folder.
        settings.trainer = move_paths(settings.trainer, old, new)
        settings.run.folder = str(new)
        rank_zero_info(f"The run was moved from {old} to {new}, and continues there.")

    def before_instantiate_classes(self) -> None:
        """Restore the path of the checkpoint, which parsing hid from LightningCLI."""
        self.config.fit.ckpt_path = self.resumed_from

    def before_fit(self) -> None:
        """Check the run folder before Lightning opens its logger there."""
        settings = self.config_init.fit
        if self.trainer.is_global_zero:
            settings.run.folder.check(resuming=settings.ckpt_path is not None or settings.run.resume)

    def train_control(self) -> None:
        """Train the dense control, if the recipe requests one, after the run is written."""
        report: RunReport = self.config_init.fit.run
        if not self.config.fit.control or not report.training_record.steps:
            return
        end_loggers(self.trainer.loggers)
        self.model = self.datamodule = self.trainer = self.config_init = None  # frees their memory
        gc.collect()
        if (seed := self.config.fit.seed_everything) is not None and seed is not False:
            seed_everything(seed, workers=True)
        fresh = self.parser.instantiate_classes(self.config).fit
        folder = report.folder.path
        others = [callback for callback in _as_list(fresh.trainer.callbacks) if not isinstance(callback, _ONCE_PER_RUN)]
        settings = {
            "callbacks": [*others, DenseControl(report)],
            "logger": loggers_of_run(report.loggers, folder / LOGS / "control", f"{report.name} control") or False,
            "default_root_dir": str(folder),
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        Trainer(**{**fresh.trainer, **settings}).fit(fresh.model, datamodule=fresh.get("data"))

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit`, as RunReport evaluates during the fit."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of the recipe; by default, logs and checkpoints go to the run folder."""
        settings = self.config_init.fit
        folder: Path = settings.run.folder.path
        if (own := settings.trainer.logger) is False:
            settings.run.loggers = ()
        kwargs["logger"] = [*_as_list(None if isinstance(own, bool) else own), *settings.run.new_loggers()] or False
        callbacks, plugins = _as_list(settings.trainer.callbacks), _as_list(settings.trainer.plugins)
        if settings.trainer.enable_checkpointing is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
            callbacks += checkpoints_of_run(folder)
        if not any(isinstance(callback, SparseCheckpoints) for callback in callbacks):
            callbacks.append(SparseCheckpoints(str(folder)))
        callbacks.append(_CheckData())
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        ours = {"callbacks": callbacks, "plugins": plugins, "default_root_dir": str(folder)}
        with trainer_errors():
            return super().instantiate_trainer(**ours | kwargs)


def checkpoints_of_run(folder: Path) -> list[Callback]:
    """The checkpoint callbacks of a run if its recipe has none."""
    # Both write last.ckpt as a file, always the newest checkpoint; a symbolic link would be broken for a moment.
    common = {"dirpath": folder / "checkpoints", "save_last": True, "enable_version_counter": False}
    return [
        ModelCheckpoint(**common, save_on_exception=True),
        # Streamed data have no ends of epochs to save at.
        ModelCheckpoint(**common, filename="timed-{step}", train_time_interval=CHECKPOINT_INTERVAL),
    ]


class _Read(Exception):
    def __init__(self, settings: Namespace) -> None:
        self.settings = settings


class _RecipeReader(SparsefitCLI):
    """Stops before LightningCLI instantiates classes."""

    def before_instantiate_classes(self) -> None:
        """Leave with the parsed settings."""
        raise _Read(self.config.fit)


class _CheckData(Callback):
    """Checks after setup that data and model fit together."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.datamodule is not None:
            check_data(pl_module, trainer.datamodule)


class _ConfigurationOfRun(SaveConfigCallback):
    """Gives the full configuration to the run's report."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.config.clone()
        config.run.resume = False  # a new run with this file starts from the beginning
        text = self.parser.dump(config, skip_none=False)
        for callback in trainer.callbacks:
            if isinstance(callback, RunReport):
                callback.take_configuration(text)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
