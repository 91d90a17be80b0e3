"""Run folders that an attacker prepared, to run code or to have files outside the folder read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from faults.forked_commands import ForkedCommands
from faults.outcomes import Row, tail
from sparsefit.files import file_sum, write_sums
from sparsefit.recovery.run_files import WRITTEN_FOLDERS, read_state

Change = Callable[[Path], None]
"""A change that an attacker makes in a run folder."""


def hostile_folders(commands: ForkedCommands, run: Path, step: int = 1) -> Row:
    """Give commands hostile run folders with valid checksums: no code may run, no file outside may be read."""
    row, canary = Row("hostile run folders"), commands.folder / "canary"
    secret = str(shutil.copytree(run / "base", commands.folder / "secret"))
    for what, prepare, (command, *more) in hostile_cases(canary, secret)[::step]:
        row.tried += 1
        folder, out = commands.folder / "hostile", commands.folder / "out"
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(run, folder)
        prepare(folder)
        reseal(folder)
        target = ("--resume", folder) if command == "fit" else (folder,)
        status = commands.run(command, *target, *(argument.format(out=out) for argument in more))
        refused = commands.reported(status)
        measured_nothing = status == 0 and command == "merge" and "quality: not measured" in commands.output
        if canary.exists():
            row.silent.append(f"{what}, {command}: the code was run")
            canary.unlink()
        elif refused or measured_nothing:
            row.reported += 1
        else:
            row.silent.append(f"{what}, {command}: status {status}: {tail(commands.output)}")
    return row


def hostile_cases(canary: Path, secret: str) -> list[tuple[str, Change, tuple[str, ...]]]:
    """Hostile cases: a description, the change in the folder, and the command that is run on the folder.

    Args:
        canary: A file that exists if hostile code was run.
        secret: A folder outside the run, with a model in it.
    """
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(canary)]}}
    merging, resuming = ("merge", "--output={out}"), ("fit", "--trainer.max_steps=9")
    return [
        ("data are a Popen", recipe_with(lambda s: s.update(data=popen)), merging),
        ("data are a Popen", recipe_with(lambda s: s.update(data=popen)), resuming),
        ("the model is a Popen", recipe_with(lambda s: s.update(model=popen)), merging),
        ("the model is a Popen", recipe_with(lambda s: s.update(model=popen)), resuming),
        ("a callback is a Popen", recipe_with(lambda s: s["trainer"].update(callbacks=[popen])), resuming),
        ("the logger is a Popen", recipe_with(lambda s: s["trainer"].update(logger=popen)), resuming),
        ("a plugin is a Popen", recipe_with(lambda s: s["trainer"].update(plugins=[popen])), resuming),
        ("calibration is a Popen", recipe_with(lambda s: s["pruning"].update(calibration=popen)), resuming),
        ("a Popen inside the data", recipe_with(lambda s: s["data"]["init_args"].update(tokenizer=popen)), resuming),
        ("its base is ../secret", base_elsewhere("../secret"), merging),
        ("its base is an absolute path", base_elsewhere(secret), merging),
        *((f"an index names {name}", index_naming(name), command)
          for name in ("../../secret/model.safetensors", f"{secret}/model.safetensors")
          for command in (merging, ("inspect",), ("export", "--format=gguf", "--output={out}"))),
        ("a checkpoint with code that runs on unpickling", harmful_checkpoint(canary), resuming),
    ]  # fmt: skip


def recipe_with(change: Callable[[dict[str, Any]], None]) -> Change:
    """Change the recipe in the folder."""

    def prepare(folder: Path) -> None:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        change(settings)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))

    return prepare


def base_elsewhere(name: str) -> Change:
    """Make the adapter refer to another base."""

    def prepare(folder: Path) -> None:
        notes = json.loads((folder / "adapter/sparsefit.json").read_text())
        (folder / "adapter/sparsefit.json").write_text(json.dumps(notes | {"base": name}))

    return prepare


def index_naming(name: str) -> Change:
    """Replace the weights of the models by an index that names a file."""

    def prepare(folder: Path) -> None:
        for part in ("base", "model"):
            entries = {"weight_map": {"model.norm.weight": name}, "metadata": {}}
            (folder / part / "model.safetensors.index.json").write_text(json.dumps(entries))
            (folder / part / "model.safetensors").unlink()

    return prepare


def harmful_checkpoint(canary: Path) -> Change:
    """Put code that runs on unpickling into the checkpoints."""

    def prepare(folder: Path) -> None:
        for path in (folder / "checkpoints").iterdir():
            torch.save(torch.load(path, weights_only=True) | {"more": Harmful(canary)}, path)

    return prepare


class Harmful:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def reseal(folder: Path) -> None:
    """Write valid checksums into a run folder, as an attacker would."""
    for part in WRITTEN_FOLDERS:
        if (folder / part).is_dir():
            write_sums(folder / part)
    state = read_state(folder)
    sums = {name: file_sum(folder / name) for name in state.sums}
    replace(state, sums=sums).write(folder)
