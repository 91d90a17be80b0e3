"""The folder of a run: checked before the run spends time, written during it, and locked by one process."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from sparsefit.errors import RunFolderError
from sparsefit.files import LOCK_FILE, check_sums, file_sum, is_partial, lock_folder, replacing, write_text
from sparsefit.pruning import MaskSet
from sparsefit.recovery import run_files
from sparsefit.recovery.adapter_files import export_adapter
from sparsefit.recovery.export import adapted_part, export_base, trains_base, write_model
from sparsefit.recovery.inspection import BASE_FOLDER, MASKS_FILE, MODEL_FOLDER
from sparsefit.recovery.merge import merged_state_dict
from sparsefit.recovery.quantize import in_floats
from sparsefit.recovery.run_files import RunState
from sparsefit.reporting.card import model_card
from sparsefit.reporting.formats import size
from sparsefit.reporting.pages import render_html
from sparsefit.reporting.report import write_json

LOGS = "logs"
CARD_FILE = "README.md"
_ORPHANS_END = 6.0
"""Seconds for which the DataLoader workers of a killed run may hold its lock: they check for their parent every 5."""
TEXT = "written_text"
"""Folder of the text that the dense model generated (`SelfGeneratedDataModule`). A run that replaces an interrupted
one reads it."""


class RunFolder:
    """The paths of a run's files, and the functions that write them. Creates nothing before `check`.

    Args:
        path: The folder.

    Attributes:
        image_processor: The image processor of the data, saved with models that have none of their own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.image_processor: Any = None
        self.base = self.path / BASE_FOLDER
        self.trained_base = self.path / run_files.TRAINED_BASE_FOLDER
        self.adapter = self.path / run_files.ADAPTER_FOLDER
        self.model = self.path / MODEL_FOLDER
        self.masks = self.path / MASKS_FILE
        self.json = self.path / run_files.REPORT_FILE
        self.html = self.path / run_files.PAGE_FILE
        self.card = self.path / CARD_FILE
        self.configuration = self.path / run_files.CONFIG_FILE
        self._lock: Any = None

    def check(self, resuming: bool) -> None:
        """Check that a run may use the folder, and create it if it is missing.

        Raises:
            RunFolderError: if the folder is not empty (and no run is resumed), cannot be written to, or is used by
                another process.
        """
        self._prepare(resuming)
        if (self.path / LOCK_FILE).exists():  # otherwise no process has used the folder
            self.lock(resuming)
            self.release()

    def lock(self, resuming: bool) -> None:
        """Check the folder as `check` does, and lock it for this process until `release`."""
        self._prepare(resuming)
        try:
            self._lock = self._lock or lock_folder(self.path, "run", wait=_ORPHANS_END)
            for left in filter(is_partial, self.path.iterdir()):  # left by a killed run
                left.unlink(missing_ok=True)
        except RunFolderError:
            raise
        except OSError as error:
            raise RunFolderError(f"the run folder {self.path} cannot be written to: {error}") from error

    def _prepare(self, resuming: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"the run folder {self.path} is a file; choose another path")
        try:
            # Lightning opens its loggers before the first hook of any callback, so their files may exist.
            if not resuming and not self._is_free():
                raise RunFolderError(
                    f"the run folder {self.path} exists and is not empty. Choose another folder, move this one away, "
                    f"or go on with its run: `sparsefit fit --resume {self.path}`; in a loop of your own, "
                    "RunReport(folder, resume=True) and trainer.fit(..., ckpt_path=report.checkpoint)"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"sparsefit")
        except RunFolderError:
            raise
        except OSError as error:
            raise RunFolderError(f"the run folder {self.path} cannot be written to: {error}") from error

    def release(self) -> None:
        """Release the lock on the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _is_free(self) -> bool:
        """Whether the folder holds nothing of value: no files, or those of a run that stopped before it had a base."""
        entries = list(self.path.iterdir()) if self.path.is_dir() else []
        half = f"{BASE_FOLDER}.partial"  # `replacing` removes it
        names = {entry.name for entry in entries if not is_partial(entry)} - {TEXT, LOCK_FILE, half}
        told = {file.name for file in (self.json, self.html, self.card, self.configuration)} | {run_files.STATE_FILE}
        begun = {self.configuration.name, run_files.STATE_FILE} & names
        broke_off = self._read("status") in ("interrupted", "failed") or (begun and not self.json.exists())
        return names <= {LOGS} or (bool(broke_off) and names <= {LOGS, *told})

    def _read(self, key: str) -> Any:
        try:
            return json.loads(self.json.read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            return None

    def _check_room(self, module: nn.Module) -> None:
        # The sparse base and the recovered model; two checkpoints (last epoch, timed), each with the new file that
        # replaces it; checkpoints hold the two moments of Adam for trained weights.
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in module.parameters()]
        weights, trained = sum(count for count, _ in sizes), sum(count for count, trains in sizes if trains)
        needed = 2 * weights + 4 * (weights + 2 * trained)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunFolderError(
                f"the disk of the run folder {self.path} has {size(free)} free; the sparse model and its "
                f"checkpoints need about {size(needed)}. Free some space or choose another folder"
            )

    def claim(self, module: nn.Module, run: str | None, masks: MaskSet | None, resuming: bool, may_resume: bool) -> str:
        """Check that a run may use the folder and fits on its disk, and lock it.

        Args:
            module: The module of the run.
            run: The id of the run, if a checkpoint holds one.
            masks: The masks of a checkpoint, if there is one, by the names in `masks.safetensors`.
            resuming: Whether the run resumes from a checkpoint.
            may_resume: Whether the run may continue an earlier one in the folder.

        Returns:
            The id of the run.

        Raises:
            RunFolderError: as `check` and `check_same_run`; if the disk has no space for the model and its checkpoints;
                or if the run would start from the beginning although the folder has a checkpoint of it.
        """
        self._prepare(resuming or may_resume)
        self._check_room(module)
        self.lock(resuming or may_resume)
        if not resuming and (newest := self.newest_checkpoint()) is not None:
            raise RunFolderError(
                f"the run in {self.path} has a checkpoint, {newest}: give it to the fit "
                "(trainer.fit(..., ckpt_path=report.checkpoint)), or take a new folder"
            )
        if masks is not None:
            self.check_same_run(run, masks)
        return run or self.run_id() or uuid4().hex

    def check_same_run(self, run: str | None, masks: MaskSet) -> None:
        """Check that a base in the folder, if there is one, is undamaged and belongs to the run that is resumed.

        Args:
            run: The id of the run, if the checkpoint holds one.
            masks: Its masks, by the names in `masks.safetensors`.

        Raises:
            RunFolderError: if the base is damaged, or belongs to another run.
        """
        there = self.run_id()
        if not self.masks.exists():
            return
        if there is not None and run is not None and there != run:
            raise RunFolderError(
                f"the run folder {self.path} holds another run than the one that the checkpoint is from. Give "
                "the folder of that run, or a new one"
            )
        if MaskSet.load(self.masks).digest() != masks.digest():
            raise RunFolderError(
                f"the run folder {self.path} holds another run: its masks are not those of the checkpoint. Give "
                "the folder of the run that the checkpoint is from, or a new one"
            )
        check_sums(self.base)

    def holds_run(self) -> bool:
        """Whether the folder holds files of a run."""
        return run_files.holds_run(self.path)

    def run_id(self) -> str | None:
        """The id of the run in the folder; None if there is none."""
        state = run_files.read_state(self.path)
        return self._read("id") if state is None else state.run

    def state(self) -> RunState | None:
        """The state of the run in the folder."""
        return run_files.read_state(self.path)

    def has_results(self) -> bool:
        """Whether the run has finished before and its results are in the folder."""
        state = self.state()
        return state is not None and state.results > 0

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint with the most optimizer steps; None if there is none."""
        return run_files.newest_checkpoint(self.path)

    def write_state(self, name: str, run: str | None, step: int, error: str | None = None) -> None:
        """Write the state of the run to `state.json`."""
        sums = {file.name: file_sum(file) for file in (self.configuration,) if file.is_file()}
        before = self.state()
        results = step if name == run_files.FINISHED else before.results if before is not None else 0
        RunState(name, run, step, error, results, sums).write(self.path)

    def write_configuration(self, text: str) -> None:
        """Write the recipe of the run. A run that is killed before or after it is written can be resumed."""
        if (state := self.state()) is not None and self.configuration.is_file():
            both = f"{file_sum(self.configuration)} {hashlib.sha256(text.encode()).hexdigest()}"
            replace(state, sums={self.configuration.name: both}).write(self.path)
        write_text(text, self.configuration)

    def write_report(self, report: dict[str, Any]) -> None:
        """Write a report, its page and its model card."""
        write_text(render_html(report), self.html)
        write_text(model_card(report), self.card)
        write_json(report | {"page": file_sum(self.html)}, self.json, seal=True)

    def left_to_do(self) -> str | None:
        """Why a run with no steps left must repeat export, evaluation and report; None if all results are intact."""
        state = self.state()
        if state is None:
            return None if self._read("status") == run_files.FINISHED else "it was broken off"
        if state.name != run_files.FINISHED:
            return f"it was broken off in the state {state.name!r}"
        damaged = run_files.damaged_results(self.path)
        if damaged:
            return "; ".join(f"{name} is {reason}" for name, reason in damaged.items())
        merged = (self._read("merge") or {}).get("lossless")
        expected = [self.json, self.html, *([self.model, self.adapter] if merged else [])]
        gone = [path.name for path in expected if not path.exists()]
        if state.step and not gone and not (self.adapter.exists() or self.model.exists()):
            gone = [self.adapter.name]
        return f"{', '.join(gone)} is gone" if gone else None

    def write_base(self, module: nn.Module, masks: MaskSet) -> None:
        """Write the sparse base without adapters, then its masks. If the masks exist, the base is complete."""
        with in_floats(module), replacing(self.base) as partial:
            saved = export_base(module, masks, partial)
            self._add_processor(module, partial)
        saved.save(self.masks)

    def write_trained(self, module: nn.Module, masks: MaskSet, notes: dict[str, Any] | None = None) -> Path:
        """Write the trained weights: the adapter, or the whole model if there is none. The base is not changed. If
        parts of the base train that PEFT does not save with the adapter, the trained base is written to a folder of its
        own. A run that was resumed in another folder gets a base there. `notes` are saved with the adapter.

        Returns:
            The folder of the model or adapter.
        """
        trained = trains_base(module)
        adapted = adapted_part(module) is not None
        place = self.trained_base if adapted else self.model
        if trained:
            with replacing(place) as partial:
                saved = export_base(module, masks, partial)
                self._add_processor(module, partial)
            if not self.masks.exists():
                saved.save(self.masks)
        elif adapted and not self.masks.exists():
            self.write_base(module, masks)
        if not adapted:
            return place if trained else self.base
        with replacing(self.adapter) as partial:
            export_adapter(module, masks, place if trained else self.base, partial, notes)
        return self.adapter

    def write_merged(self, module: nn.Module, masks: MaskSet) -> None:
        """Write a model whose adapters are merged in place."""
        with replacing(self.model) as partial:
            write_model(module, masks, partial, merged_state_dict)
            self._add_processor(module, partial)

    def _add_processor(self, module: nn.Module, folder: Path) -> None:
        own = getattr(module, "image_processor", None)
        if own is None and callable(getattr(self.image_processor, "save_pretrained", None)):
            self.image_processor.save_pretrained(folder)

    def drop_merged(self) -> None:
        """Remove the merged model of an earlier adapter, whose replacement cannot be merged."""
        shutil.rmtree(self.model, ignore_errors=True)
