"""Finds the checkpoint and the folder of a run to resume."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from sparsefit.callbacks.checkpoint_io import check_whole
from sparsefit.callbacks.run_folder import RunFolder
from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.files import file_sum
from sparsefit.recovery.run_files import FINISHED, is_checkpoint
from sparsefit.reporting.report import read_json


def split_resume(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Split `--resume RUN` from the other arguments.

    >>> split_resume(["--resume", "runs/a", "--budget.gpu_hours=2"])
    (PosixPath('runs/a'), ['--budget.gpu_hours=2'])
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    given, others = parser.parse_known_args(arguments)
    return given.resume, others


def resuming_arguments(path: Path, others: list[str]) -> list[str]:
    """Arguments that resume a folder's run with its own recipe, from its newest checkpoint if it has one.

    Raises:
        RunFolderError: if the folder has no run of the command line, or its recipe was changed.
    """
    run = RunFolder(path)
    if not path.is_dir():
        raise RunFolderError(f"there is no run folder {path}")
    state = run.state()
    if not run.configuration.is_file():
        raise RunFolderError(
            f"{path} has no {run.configuration.name}, which is needed to resume: it is not a run folder, or the run "
            "used a Trainer of your own. Resume such a run with RunReport(folder, resume=True) and "
            "trainer.fit(..., ckpt_path=report.checkpoint)"
        )
    expected = state.sums.get(run.configuration.name) if state is not None else None
    if expected is not None and file_sum(run.configuration) not in expected.split():
        raise RunFolderError(
            f"{run.configuration} is not what the run wrote: it was damaged or changed. Restore it from an undamaged "
            f"copy; or, if you changed it on purpose, use it as a recipe (sparsefit fit --config {run.configuration} "
            f"--run.resume=true --ckpt_path={run.newest_checkpoint() or 'null'})"
        )
    chosen = any(argument.startswith("--ckpt_path") for argument in others)
    checkpoint = None if chosen else run.newest_checkpoint()
    status = f"in the state {state.name!r}" if state is not None else "of an earlier version"
    if not chosen:
        print(f"The run in {path}, {status}, {_where(checkpoint)}.", file=sys.stderr)
    checkpoint_argument = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
    return [f"--config={run.configuration}", *others, "--run.resume=true", *checkpoint_argument]


def is_complete(path: Path) -> bool:
    """Whether the run in a folder is finished, and its dense control if it has one."""
    run = RunFolder(path)
    if not path.is_dir() or (state := run.state()) is None or state.name != FINISHED or run.left_to_do() is not None:
        return False
    recipe = yaml.safe_load(run.configuration.read_text(encoding="utf-8")) if run.configuration.is_file() else {}
    control = read_json(run.json).get("control") or {}
    return not (recipe or {}).get("control") or control.get("status") == "finished" or not state.step


def _where(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "starts from the beginning: it has no checkpoint"
    return f"resumes from {checkpoint.name}"


def check_checkpoint(path: Path) -> None:
    """Check that a checkpoint exists and is undamaged.

    Raises:
        ConfigError: if it is missing.
        RunFolderError: if it is damaged.
    """
    if not is_checkpoint(path):
        raise ConfigError(f"there is no checkpoint {path}")
    check_whole(path)


def named_checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint that Lightning's name "last" means: the newest of the run in a folder.

    Raises:
        ConfigError: if it does not exist, or the name is another one.
    """
    path = folder / "checkpoints" / "last.ckpt"
    if name != "last":
        raise ConfigError(f"ckpt_path is {name!r}: give 'last', or the path of a checkpoint, such as {path}")
    if not is_checkpoint(path):
        raise ConfigError(f"ckpt_path is 'last', and there is no checkpoint {path}: leave out ckpt_path for a new run")
    return path


def moved_run(checkpoint: Path, folder: Path, arguments: Iterable[str]) -> Path | None:
    """The folder that a run was moved to, if the recipe still names its old folder; otherwise None.

    If the recipe names a folder that was never the run's, or the command line names one, that is followed.

    Args:
        checkpoint: The checkpoint to resume from.
        folder: The run folder of the recipe.
        arguments: The command line.

    Raises:
        ConfigError: if both folders hold a run, for example because one is a copy; names both.
    """
    here = RunFolder(checkpoint.absolute().parent.parent)
    if not here.masks.is_file() or here.path.resolve() == folder.resolve():
        return None
    on_command_line = any(arg == "--run" or arg.startswith(("--run=", "--run.folder")) for arg in arguments)
    named = _folder_in_recipe(here)
    if on_command_line or named is None or (named != folder and named.absolute() != folder.absolute()):
        return None
    if RunFolder(folder).holds_run():
        raise ConfigError(
            f"the checkpoint {checkpoint} is in the run folder {here.path}, and the recipe's run folder {folder} also "
            f"holds a run. Choose which one to resume: --run.folder={here.path} or --run.folder={folder}"
        )
    return here.path


def move_paths(settings: Any, old: Path, new: Path) -> Any:
    """Settings (namespaces, mappings, lists) with a moved folder replaced in every path."""
    if isinstance(settings, Namespace):
        return Namespace(**{key: move_paths(value, old, new) for key, value in vars(settings).items()})
    if isinstance(settings, dict):
        return {key: move_paths(value, old, new) for key, value in settings.items()}
    if isinstance(settings, list):
        return [move_paths(value, old, new) for value in settings]
    if isinstance(settings, str | Path) and Path(settings).is_relative_to(old):
        return str(new / Path(settings).relative_to(old))
    return settings


def _folder_in_recipe(run: RunFolder) -> Path | None:
    """The run folder that the recipe in a run folder names."""
    try:
        return Path(yaml.safe_load(run.configuration.read_text(encoding="utf-8"))["run"]["folder"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
