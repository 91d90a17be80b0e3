"""Reading and writing of checkpoint files: whole or not at all, and filled up as they are read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO

from sparsefit.errors import RunFolderError
from sparsefit.files import sync_folder
from sparsefit.recovery.run_files import checkpoint_damage

_PARTIAL = ".partial"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint whole or not at all, whenever the process is killed or the machine goes down.

    The file is written under another name in the same folder, brought to the disk, and then takes the place of the one
    before. What killed runs left half-written is cleared away as the next one is saved there. Paths that are not local
    are left to Lightning.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cleared: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            RunFolderError: if it cannot be written; the checkpoints that were there are untouched.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path).absolute()
        partial = path.with_name(path.name + _PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._clear(path.parent)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its archive
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise RunFolderError(
                f"the checkpoint {path} cannot be written: {error}. Those written before are whole: free some space, "
                "then resume from the last one"
            ) from error

    def _clear(self, folder: Path) -> None:
        if folder not in self._cleared:
            for left in folder.glob(f"*.ckpt{_PARTIAL}"):
                left.unlink(missing_ok=True)
            self._cleared.add(folder)


class CompletingCheckpointIO(CheckpointIO):
    """Another CheckpointIO whose checkpoints are completed as they are read."""

    def __init__(self, inner: CheckpointIO, completed: Callable[[dict[str, Any], str | Path], None]) -> None:
        self.inner = inner
        self.completed = completed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint as the other does."""
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint and complete it.

        Raises:
            RunFolderError: if it is damaged, or holds anything but tensors and plain values.
        """
        check_whole(path)
        try:
            checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise RunFolderError(
                f"the checkpoint {path} holds objects, and not tensors and plain values alone: reading it could run "
                f"whatever they say ({str(error).splitlines()[0]}). If it is your own, read it all the same: "
                "trainer.fit(..., weights_only=False), or --weights_only=false"
            ) from error
        self.completed(checkpoint, path)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Close the other."""
        self.inner.teardown()


def check_whole(path: str | Path) -> None:
    """See that every part of a local checkpoint is what was saved.

    Raises:
        RunFolderError: if one is not; says which.
    """
    if "://" in str(path) or not Path(path).is_file():
        return  # Lightning's to read, or to miss
    if reason := checkpoint_damage(Path(path)):
        raise RunFolderError(
            f"the checkpoint {path} is damaged: {reason}. Resume from an earlier one beside it (--ckpt_path), or start "
            "again in another run folder"
        )
