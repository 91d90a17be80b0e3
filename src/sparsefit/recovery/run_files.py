"""Reads the state of the run in a run folder, its checkpoints, and which of its files are damaged."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from sparsefit.errors import MaskError, RunFolderError
from sparsefit.files import SUMS_FILE, changed_files, file_sum, is_sealed, sealed, write_text
from sparsefit.pruning import MaskSet
from sparsefit.recovery.inspection import BASE_FOLDER, MASKS_FILE, MODEL_FOLDER

STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
ADAPTER_FOLDER = "adapter"
TRAINED_BASE_FOLDER = "trained_base"
CHECKPOINTS_FOLDER = "checkpoints"
META_FILE = "meta.pt"  # the file that Lightning writes last to a checkpoint folder
WRITTEN_FOLDERS = (BASE_FOLDER, TRAINED_BASE_FOLDER, ADAPTER_FOLDER, MODEL_FOLDER)
"""The folders that a run writes atomically, each with checksums of its files."""

CLAIMED = "claimed"
"""The run has locked the folder; nothing is pruned yet."""
PRUNED = "pruned"
"""The sparse base and its masks are written."""
TRAINING = "training"
CLOSING = "closing"
"""Training has ended; export, evaluation and report are in progress."""
FINISHED = "finished"
FAILED = "failed"
"""An error or an interrupt ended the run; it is in `error`."""


@dataclass(frozen=True)
class RunState:
    """The state of a run, saved in its folder.

    Attributes:
        name: One of the names above.
        run: The id of the run.
        step: Optimizer steps taken when the state was written.
        error: The error that ended a failed run.
        results: The step at which the run last finished, for which the folder holds all results; 0 if it never did.
        sums: File name -> sha256, for files that the run reads on resuming. While a file is being replaced, the sums
            of both versions, separated by a space.
    """

    name: str
    run: str | None = None
    step: int = 0
    error: str | None = None
    results: int = 0
    sums: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the state to a run folder, atomically."""
        write_text(json.dumps(sealed(asdict(self)), indent=2) + "\n", folder / STATE_FILE)


def read_state(folder: Path) -> RunState | None:
    """The state of the run in a folder; None if there is no run, or one of an earlier version.

    Raises:
        RunFolderError: if it is damaged.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not is_sealed(values):
            raise ValueError("its seal does not hold")
        values.pop("sha256", None)
        return RunState(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{file} is damaged ({error}), so it is not known how far the run came. Copy it again from an undamaged "
            "copy; or delete it, and the run resumes from its newest checkpoint"
        ) from error


def holds_run(folder: Path) -> bool:
    """Whether a folder holds files of a run."""
    names = (STATE_FILE, REPORT_FILE, CONFIG_FILE, MASKS_FILE, BASE_FOLDER)
    return any((folder / name).exists() for name in names)


def check_ended(folder: Path) -> None:
    """Check that the run in a folder has ended, so that its files belong together; folders without a run pass.

    Raises:
        RunFolderError: if the run is in progress, or was killed during training or at its end; says how to continue.
    """
    state = read_state(folder)
    if state is not None and state.name in (TRAINING, CLOSING):
        raise RunFolderError(
            f"the run in {folder} has not ended: its state is {state.name!r} at step {state.step}. Wait for it; if it "
            f"was killed, `sparsefit fit --resume {folder}` goes on with it"
        )


def damaged_files(folder: Path) -> dict[str, str]:
    """The damaged or changed files of a run folder by their names in it, with a reason for each.

    Checked are state, configuration, report, masks, checkpoints, and all files in `WRITTEN_FOLDERS`.
    """
    damaged: dict[str, str] = {}
    try:
        state = read_state(folder)
    except RunFolderError as error:
        damaged[STATE_FILE], state = str(error), None
    for name, expected in (state.sums if state is not None else {}).items():
        if not (folder / name).is_file() or file_sum(folder / name) not in expected.split():
            damaged[name] = "not what was written"
    damaged |= damaged_results(folder)
    damaged |= _changed_in(folder, BASE_FOLDER)
    try:
        if (folder / MASKS_FILE).is_file():
            MaskSet.load(folder / MASKS_FILE)
    except MaskError as error:
        damaged[MASKS_FILE] = str(error)
    for file in _checkpoints(folder):
        if reason := checkpoint_damage(file):
            damaged[f"{CHECKPOINTS_FOLDER}/{file.name}"] = reason
    return damaged


def damaged_results(folder: Path) -> dict[str, str]:
    """The damaged or changed files among the results of a run, which it can write again: adapter, model and report."""
    damaged = {}
    for place in (ADAPTER_FOLDER, TRAINED_BASE_FOLDER, MODEL_FOLDER):
        damaged |= _changed_in(folder, place)
    if (folder / REPORT_FILE).is_file():
        try:
            report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
            whole, page = is_sealed(report), report.get("page")
        except (OSError, ValueError, TypeError, AttributeError):
            whole, page = False, None
        if not whole:
            damaged[REPORT_FILE] = "not what was written"
        elif page is not None and (not (folder / PAGE_FILE).is_file() or file_sum(folder / PAGE_FILE) != page):
            damaged[PAGE_FILE] = "not what was written"
    return damaged


def _changed_in(folder: Path, part: str) -> dict[str, str]:
    return {f"{part}/{name}": f"not what its {SUMS_FILE} says" for name in changed_files(folder / part)}


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in a run folder with the most steps, of several the one written last; None if there is none. An
    unreadable checkpoint comes first, so that resuming from it raises and the user can choose another."""
    return max(_checkpoints(folder), key=_step_of, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in sorted((folder / CHECKPOINTS_FOLDER).glob("*.ckpt")) if is_checkpoint(path)]


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint: a file, or a folder with sharded weights that holds the file written last."""
    return path.is_file() or (path / META_FILE).is_file()


def _step_of(path: Path) -> tuple[int, int]:
    try:
        file = path / META_FILE if path.is_dir() else path
        step = torch.load(file, weights_only=True, map_location="cpu", mmap=True)["global_step"]
    except Exception:  # resuming from it raises the error
        step = sys.maxsize
    return step, path.stat().st_mtime_ns


def checkpoint_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, found by the checksums in its archives; None if it is undamaged."""
    if not path.is_dir():
        return _archive_damage(path)
    try:
        stored = FileSystemReader(path).read_metadata().storage_data
    except Exception as error:  # a damaged pickle can raise any error
        return f"its .metadata cannot be read ({error})"
    if damage := _archive_damage(path / META_FILE):
        return f"in its {META_FILE}, {damage}"
    for part in stored.values():
        try:
            with open(path / part.relative_path, "rb") as file:
                file.seek(part.offset)
                damage = _archive_damage(io.BytesIO(file.read(part.length)))
        except OSError as error:
            damage = f"it cannot be read ({error})"
        if damage:
            return f"in its {part.relative_path}, {damage}"
    return None


def _archive_damage(archive: Path | io.BytesIO) -> str | None:
    try:
        with zipfile.ZipFile(archive) as parts:
            record = parts.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"it cannot be read ({error})"
    return None if record is None else f"its part {record} is not what was saved"
