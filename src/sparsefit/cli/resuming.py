"""The checkpoint that a recipe goes on from, and the run folder that it goes on in."""

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
    """The run folder that a command line goes on in (`--resume RUN`), and the other arguments.

    >>> split_resume(["--resume", "runs/a", "--budget.gpu_hours=2"])
    (PosixPath('runs/a'), ['--budget.gpu_hours=2'])
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    given, others = parser.parse_known_args(arguments)
    return given.resume, others


def resuming_arguments(path: Path, others: list[str]) -> list[str]:
    """The command line by which the run in a folder goes on: its own recipe, and its newest checkpoint if it has one.

    Raises:
        RunFolderError: if there is no run that the command made, or what it goes by is damaged.
    """
    run = RunFolder(path)
    if not path.is_dir():
        raise RunFolderError(f"there is no run folder {path}")
    state = run.state()
    if not run.configuration.is_file():
        raise RunFolderError(
            f"{path} has no {run.configuration.name}, by which its run could go on: it is no run folder, or the run is "
            "one of a Trainer of your own. There, RunReport(folder, resume=True) and "
            "trainer.fit(..., ckpt_path=report.checkpoint) go on"
        )
    expected = state.sums.get(run.configuration.name) if state is not None else None
    if expected is not None and file_sum(run.configuration) not in expected.split():
        raise RunFolderError(
            f"{run.configuration} is not what the run wrote: damaged, or changed since. Copy it again from where it is "
            f"whole; or, if you changed it on purpose, take it as a recipe (sparsefit fit --config {run.configuration} "
            f"--run.resume=true --ckpt_path={run.newest_checkpoint() or 'null'})"
        )
    chosen = any(argument.startswith("--ckpt_path") for argument in others)
    checkpoint = None if chosen else run.newest_checkpoint()
    came = f"in the state {state.name!r}" if state is not None else "of an earlier version"
    if not chosen:
        print(f"The run in {path}, {came}, {_from(checkpoint)}.", file=sys.stderr)
    from_there = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
    return [f"--config={run.configuration}", *others, "--run.resume=true", *from_there]


def is_complete(path: Path) -> bool:
    """Whether the run in a folder, and its control if it has one, has nothing left to do."""
    run = RunFolder(path)
    if not path.is_dir() or (state := run.state()) is None or state.name != FINISHED or run.left_to_do() is not None:
        return False
    wants = yaml.safe_load(run.configuration.read_text(encoding="utf-8")) if run.configuration.is_file() else {}
    control = read_json(run.json).get("control") or {}
    return not (wants or {}).get("control") or control.get("status") == "finished" or not state.step


def _from(checkpoint: Path | None) -> str:
    return "begins anew: it has no checkpoint" if checkpoint is None else f"goes on from {checkpoint.name}"


def check_checkpoint(path: Path) -> None:
    """See that a checkpoint is there, and whole.

    Raises:
        ConfigError: if it is missing.
        RunFolderError: if it is damaged.
    """
    if not is_checkpoint(path):
        raise ConfigError(f"there is no checkpoint {path}")
    check_whole(path)


def named_checkpoint(name: str, folder: Path) -> Path:
    """The file that a name of Lightning's stands for: the last checkpoint of the run in a folder.

    Raises:
        ConfigError: if there is none, or for another name than "last".
    """
    path = folder / "checkpoints" / "last.ckpt"
    if name != "last":
        raise ConfigError(f"ckpt_path is {name!r}: give 'last', or the path of a checkpoint, such as {path}")
    if not is_checkpoint(path):
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
