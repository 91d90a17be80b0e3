"""The folder of a run: checked before the hours are spent, filled as they are."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sparsefit.errors import RunFolderError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapter_files import export_adapter
from sparsefit.recovery.export import adapted_part, export_base, trains_base, write_model
from sparsefit.recovery.inspection import BASE_FOLDER, MASKS_FILE, MODEL_FOLDER
from sparsefit.recovery.merge import merged_state_dict
from sparsefit.recovery.quantize import in_floats

LOGS = "logs"
TEXT = "written_text"
"""What the dense model wrote (`SelfGeneratedDataModule`): a run that takes the place of one that broke off reads it."""


class RunFolder:
    """Where the things of a run lie. Holds the path; makes nothing before `check`.

    Args:
        path: The folder.

    Attributes:
        image_processor: That of the data, which is written beside a model that has none of its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.image_processor: Any = None
        self.base = self.path / BASE_FOLDER
        self.trained_base = self.path / "trained_base"
        self.adapter = self.path / "adapter"
        self.model = self.path / MODEL_FOLDER
        self.masks = self.path / MASKS_FILE
        self.json = self.path / "report.json"
        self.html = self.path / "report.html"
        self.configuration = self.path / "config.yaml"

    def check(self, resuming: bool) -> None:
        """See that a run may use the folder, which is made if it is not there.

        Raises:
            RunFolderError: if the folder holds anything already (and no run is resumed), or cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"the run folder {self.path} is a file; choose another path")
        try:
            # Lightning opens its loggers before any callback's first hook.
            if not resuming and not self._is_free():
                raise RunFolderError(
                    f"the run folder {self.path} exists and is not empty. Choose another folder, move this one away, "
                    "or go on with its run by resuming from its checkpoint"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"sparsefit")
        except RunFolderError:
            raise
        except OSError as error:
            raise RunFolderError(f"the run folder {self.path} cannot be written to: {error}") from error

    def _is_free(self) -> bool:
        """Whether there is nothing to lose: no files, or those of a run that broke off before it had a base."""
        names = {entry.name for entry in self.path.iterdir()} - {TEXT} if self.path.is_dir() else set()
        told = {file.name for file in (self.json, self.html, self.configuration)}
        broke_off = self._read("status") in ("interrupted", "failed") and names <= {LOGS, *told}
        killed = names == {LOGS, self.configuration.name}  # before there was anything to report
        return broke_off or killed or names <= {LOGS}

    def _read(self, key: str) -> Any:
        try:
            return json.loads(self.json.read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            return None

    def claim(self, module: nn.Module, resuming: bool) -> None:
        """See that a run may use the folder and that a run of this model fits into it.

        Raises:
            RunFolderError: as `check`, or if its disk is too full for the model and a checkpoint of it.
        """
        self.check(resuming)
        # The sparse base and the recovered model, the checkpoint of the last epoch and the timed one, and what replaces
        # each, with the two moments of Adam for what trains.
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in module.parameters()]
        weights, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        needed = 2 * weights + 4 * (weights + 2 * trained)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunFolderError(
                f"the disk of the run folder {self.path} has {free / 1e9:.1f} GB free; the sparse model and its "
                f"checkpoints need about {needed / 1e9:.1f} GB. Free some space or choose another folder"
            )

    def check_same_run(self, run: str | None, masks: MaskSet) -> None:
        """See that a base in the folder, if there is one, is that of a run which is resumed.

        Args:
            run: The id of that run, if it is known.
            masks: Its masks, under the names that they are written with.

        Raises:
            RunFolderError: if the folder holds another run.
        """
        if not self.masks.exists():
            return
        there = self.run_id()
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

    def holds_run(self) -> bool:
        """Whether anything of a run lies in the folder."""
        return any(path.exists() for path in (self.json, self.configuration, self.masks, self.base))

    def run_id(self) -> str | None:
        """The id of the run in the folder, from its report; None where there is none."""
        return self._read("id")

    def write_base(self, module: nn.Module, masks: MaskSet) -> None:
        """Write the sparse base, without adapters, and then its masks: where these are, the base is whole."""
        with in_floats(module):
            saved = export_base(module, masks, self.base)
        self._add_processor(module, self.base)
        saved.save(self.masks)

    def write_trained(self, module: nn.Module, masks: MaskSet, notes: dict[str, Any] | None = None) -> Path:
        """Write what was trained: the adapter, or else the model itself. The base stays as it was written; one that
        trains beside its adapters, in other parts than PEFT saves with them, is written anew in a folder of its own. A
        run that was resumed in another folder than its own gets a base there. `notes` are kept beside an adapter.

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
        shutil.rmtree(self.model, ignore_errors=True)  # of the adapter that this one takes the place of
        export_adapter(module, masks, place if trained else self.base, self.adapter, notes)
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


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Another folder to write to, which takes the place of `folder` once all is written; gone if it never is.

    `folder` is as it was or as it is to be, and never in between. If the process is killed just as one takes the
    other's place, both lie beside it, whole.
    """
    partial, old = (folder.with_name(f"{folder.name}.{what}") for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
