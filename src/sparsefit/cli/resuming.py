"""The checkpoint that a recipe goes on from, and the run folder that it goes on in."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace

from sparsefit.callbacks.run_folder import RunFolder
from sparsefit.errors import ConfigError


def check_checkpoint(path: Path) -> None:
    """See that a checkpoint can be read.

    Raises:
        ConfigError: if it is missing or damaged.
    """
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint {path}")
    try:
        torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        if "Weights only load failed" in str(error):
            return  # whole, but it holds objects of the user's own
        raise ConfigError(
            f"the checkpoint {path} is damaged and cannot be read ({type(error).__name__}: {error}). "
            "Resume from an earlier one, or start again in another run folder"
        ) from error


def named_checkpoint(name: str, folder: Path) -> Path:
    """The file that a name of Lightning's stands for: the last checkpoint of the run in a folder.

    Raises:
        ConfigError: if there is none, or for another name than "last".
    """
    path = folder / "checkpoints" / "last.ckpt"
    if name != "last":
        raise ConfigError(f"ckpt_path is {name!r}: give 'last', or the path of a checkpoint, such as {path}")
    if not path.is_file():
        raise ConfigError(f"ckpt_path is 'last', and there is no checkpoint {path}: leave it out to begin a run")
    return path


def moved_run(checkpoint: Path, folder: Path, arguments: Iterable[str]) -> Path | None:
    """The folder that a run was moved to, if the recipe that it is resumed by still names the one where it was.

    A recipe with another folder than the run's own, or a folder on the command line, is taken at its word: the run goes
    on there.

    Args:
        checkpoint: The checkpoint to resume from.
        folder: The run folder of the recipe.
        arguments: The command line.

    Raises:
        ConfigError: if a run lies in either, as when one is a copy of the other; names both.
    """
    here = RunFolder(checkpoint.absolute().parent.parent)
    if not here.masks.is_file() or here.path.resolve() == folder.resolve():
        return None
    said = any(argument == "--run" or argument.startswith(("--run=", "--run.folder")) for argument in arguments)
    named = _named_in(here)
    if said or named is None or (named != folder and named.absolute() != folder.absolute()):
        return None
    if RunFolder(folder).holds_run():
        raise ConfigError(
            f"the checkpoint {checkpoint} lies in the run folder {here.path}, and the recipe's run folder {folder} "
            f"holds a run, too. Say which of the two goes on: --run.folder={here.path} or --run.folder={folder}"
        )
    return here.path


def move_paths(settings: Any, old: Path, new: Path) -> Any:
    """Settings (namespaces, mappings, lists) with every path in a folder led to the one it was moved to."""
    if isinstance(settings, Namespace):
        return Namespace(**{key: move_paths(value, old, new) for key, value in vars(settings).items()})
    if isinstance(settings, dict):
        return {key: move_paths(value, old, new) for key, value in settings.items()}
    if isinstance(settings, list):
        return [move_paths(value, old, new) for value in settings]
    if isinstance(settings, str | Path) and Path(settings).is_relative_to(old):
        return str(new / Path(settings).relative_to(old))
    return settings


def _named_in(run: RunFolder) -> Path | None:
    """The run folder that the recipe in a run folder names."""
    try:
        return Path(yaml.safe_load(run.configuration.read_text(encoding="utf-8"))["run"]["folder"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
