"""Reading and writing of checkpoint files: whole or not at all, and filled up as they are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO

from sparsefit.errors import RunFolderError

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
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clear(path.parent)
        partial = path.with_name(path.name + _PARTIAL)
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its archive
            partial.unlink(missing_ok=True)
            raise RunFolderError(
                f"the checkpoint {path} cannot be written: {error}. Those written before are whole: free some space, "
                "then resume from the last one"
            ) from error
        _sync_folder(path.parent)

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
        """Read a checkpoint and complete it."""
        checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        self.completed(checkpoint, path)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Close the other."""
        self.inner.teardown()


def _sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
