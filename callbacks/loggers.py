"""The loggers that a run names: each writes to a place of its own in the run folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeAlias

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from sparsefit.errors import ConfigError
from sparsefit.extras import need

LoggerName: TypeAlias = Literal["csv", "tensorboard", "wandb"]
_LIBRARIES = {"csv": None, "tensorboard": "tensorboard", "wandb": "wandb"}
_PROJECT = "sparsefit"


def logger_names(named: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names of loggers, each once, seen to be usable here.

    Raises:
        ConfigError: for an unknown name, or where the library of a logger is not installed.
    """
    names = tuple(dict.fromkeys([named] if isinstance(named, str) else named or ()))
    for name in names:
        if name not in _LIBRARIES:
            raise ConfigError(f"there is no logger {name!r}: the choices are {', '.join(_LIBRARIES)}")
        if (library := _LIBRARIES[name]) is not None:
            need(library, f"the logger {name}")
    return names


def loggers_of_run(names: Iterable[str], folder: Path, title: str) -> list[Logger]:
    """Loggers by their names. Nothing is written before they are first used.

    Args:
        names: What `logger_names` gave.
        folder: Where each makes a folder of its own: `csv`, `tensorboard`, `wandb`.
        title: Of the run, for loggers that keep many runs in one place.
    """
    made: list[Logger] = []
    for name in names:
        if name == "csv":
            made.append(CSVLogger(folder, name=name))  # each fit gets a file of its own: it would remove an old one
        elif name == "tensorboard":
            made.append(TensorBoardLogger(folder, name=name, version=""))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            made.append(WandbLogger(name=title, save_dir=folder, project=_PROJECT, offline=_is_offline()))
    return made


def end_loggers(loggers: Iterable[Logger]) -> None:
    """End what goes on until the process ends: a run of wandb, which would be that of the next fit, too."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _is_offline() -> bool:
    """Whether wandb has to keep its run on this machine: it has no key to send it with, and nothing else was said."""
    import wandb

    return "WANDB_MODE" not in os.environ and not wandb.api.api_key
