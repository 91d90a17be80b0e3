"""The loggers that a run asks for by name; each writes to its own place in the run folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from sparsefit.errors import ConfigError
from sparsefit.extras import need

LoggerName: TypeAlias = Literal["csv", "tensorboard", "wandb"]
_LIBRARIES = {"csv": None, "tensorboard": "tensorboard", "wandb": "wandb"}
_PROJECT = "sparsefit"


def logger_names(named: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names of loggers without duplicates, after a check that each can be used.

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
    """Create loggers from their names. Nothing is written before a logger is first used.

    Args:
        names: What `logger_names` returned.
        folder: Where each logger creates its own folder: `csv`, `tensorboard`, `wandb`.
        title: Name of the run, for loggers that keep many runs in one place.
    """
    made: list[Logger] = []
    for name in names:
        if name == "csv":
            made.append(CSVLogger(folder, name=name))  # a new version for each fit: it would delete an existing file
        elif name == "tensorboard":
            made.append(TensorBoardLogger(folder, name=name, version=""))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            mode = {} if "WANDB_MODE" in os.environ or has_wandb_key() else {"mode": "offline"}
            made.append(WandbLogger(name=title, save_dir=folder, project=_PROJECT, **mode))
    return made


def end_loggers(loggers: Iterable[Logger]) -> None:
    """Finish the runs of wandb, which otherwise stay open for the next fit of this process."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def has_wandb_key() -> bool:
    """Whether wandb finds credentials. Looks where wandb looks, as wandb's own API for this differs between
    versions."""
    if {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"} & os.environ.keys():
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, NetrcParseError):
            if netrc(os.path.expanduser(file)).authenticators(host) is not None:
                return True
    return False
