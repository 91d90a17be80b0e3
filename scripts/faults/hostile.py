"""Run folders that somebody else has prepared, so that their code is run or files outside the folder are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from faults.outcomes import Row, tail
from faults.workplace import Workplace
from sparsefit.files import file_sum, write_sums
from sparsefit.recovery.run_files import WRITTEN_FOLDERS, read_state

Change = Callable[[Path], None]
"""What somebody does to a run folder."""


def hostile_folders(place: Workplace, run: Path, step: int = 1) -> Row:
    """Run folders that somebody else has prepared, sums and seals in order: nothing may be run, or lead out of them."""
    row, canary = Row("hostile run folders"), place.folder / "canary"
    secret = str(shutil.copytree(run / "base", place.folder / "secret"))
    for what, prepare, (command, *more) in hostile_cases(canary, secret)[::step]:
        row.tried += 1
        folder, out = place.folder / "hostile", place.folder / "out"
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(run, folder)
        prepare(folder)
        reseal(folder)
        target = ("--resume", folder) if command == "fit" else (folder,)
        status = place.command(command, *target, *(argument.format(out=out) for argument in more))
        refused = place.told(status)
        measured_nothing = status == 0 and command == "merge" and "quality: not measured" in place.output
        if canary.exists():
            row.silent.append(f"{what}, {command}: it was run")
            canary.unlink()
        elif refused or measured_nothing:
            row.told += 1
        else:
            row.silent.append(f"{what}, {command}: status {status}: {tail(place.output)}")
    return row


def hostile_cases(canary: Path, secret: str) -> list[tuple[str, Change, tuple[str, ...]]]:
    """What is hostile in a folder, how it gets there, and a command with its options that is given the folder.

    Args:
        canary: A file that is there once something was run.
        secret: A folder outside the run, with a model.
    """
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(canary)]}}
    merging, going_on = ("merge", "--output={out}"), ("fit", "--trainer.max_steps=9")
    return [
        ("data are a Popen", recipe_with(lambda s: s.update(data=popen)), merging),
        ("data are a Popen", recipe_with(lambda s: s.update(data=popen)), going_on),
        ("the model is a Popen", recipe_with(lambda s: s.update(model=popen)), merging),
        ("the model is a Popen", recipe_with(lambda s: s.update(model=popen)), going_on),
        ("a callback is a Popen", recipe_with(lambda s: s["trainer"].update(callbacks=[popen])), going_on),
        ("the logger is a Popen", recipe_with(lambda s: s["trainer"].update(logger=popen)), going_on),
        ("a plugin is a Popen", recipe_with(lambda s: s["trainer"].update(plugins=[popen])), going_on),
        ("calibration is a Popen", recipe_with(lambda s: s["pruning"].update(calibration=popen)), going_on),
        ("a Popen inside the data", recipe_with(lambda s: s["data"]["init_args"].update(tokenizer=popen)), going_on),
        ("its base is ../secret", base_elsewhere("../secret"), merging),
        ("its base is an absolute path", base_elsewhere(secret), merging),
        *((f"an index names {name}", index_naming(name), command)
          for name in ("../../secret/model.safetensors", f"{secret}/model.safetensors")
          for command in (merging, ("inspect",), ("export", "--format=gguf", "--output={out}"))),
        ("a checkpoint that runs what it unpickles", harmful_checkpoint(canary), going_on),
    ]  # fmt: skip


def recipe_with(change: Callable[[dict[str, Any]], None]) -> Change:
    """Change the recipe."""

    def prepare(folder: Path) -> None:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        change(settings)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))

    return prepare


def base_elsewhere(name: str) -> Change:
    """Have the adapter name another base."""

    def prepare(folder: Path) -> None:
        notes = json.loads((folder / "adapter/sparsefit.json").read_text())
        (folder / "adapter/sparsefit.json").write_text(json.dumps(notes | {"base": name}))

    return prepare


def index_naming(name: str) -> Change:
    """Put an index that names a file where the weights of the models were."""

    def prepare(folder: Path) -> None:
        for part in ("base", "model"):
            entries = {"weight_map": {"model.norm.weight": name}, "metadata": {}}
            (folder / part / "model.safetensors.index.json").write_text(json.dumps(entries))
            (folder / part / "model.safetensors").unlink()

    return prepare


def harmful_checkpoint(canary: Path) -> Change:
    """Put what runs as it is unpickled into the checkpoints."""

    def prepare(folder: Path) -> None:
        for path in (folder / "checkpoints").iterdir():
            torch.save(torch.load(path, weights_only=True) | {"more": Harmful(canary)}, path)

    return prepare


class Harmful:
    """What unpickling runs."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def reseal(folder: Path) -> None:
    """Put the sums of a run folder in order, as whoever prepares one would."""
    for part in WRITTEN_FOLDERS:
        if (folder / part).is_dir():
            write_sums(folder / part)
    state = read_state(folder)
    sums = {name: file_sum(folder / name) for name in state.sums}
    replace(state, sums=sums).write(folder)
