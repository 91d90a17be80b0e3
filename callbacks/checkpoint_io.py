"""Checkpoint files: written atomically, checked for damage and completed when they are read."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO

from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.files import is_partial, replacing_file, unwritable
from sparsefit.recovery.run_files import META_FILE, checkpoint_damage


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: a killed process or a crash of the machine never leaves a partial checkpoint.

    Temporary files of killed runs are removed when the next checkpoint is saved to the same folder. Paths that are not
    local are written by Lightning.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cleared: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            RunFolderError: if it cannot be written; existing checkpoints are unchanged.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path).absolute()
        if path.parent not in self._cleared:
            for left in filter(is_partial, path.parent.glob(".*.ckpt.*")):
                left.unlink(missing_ok=True)
            self._cleared.add(path.parent)
        if (path / META_FILE).is_file():  # a folder checkpoint of a run with sharded weights
            shutil.rmtree(path)
        with replacing_file(path) as partial, open(partial, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's archive writer raises this when the disk is full
                raise unwritable(path, error) from error


class CompletingCheckpointIO(CheckpointIO):
    """Wraps a CheckpointIO and completes its checkpoints in place when they are read."""

    def __init__(self, inner: CheckpointIO, completed: Callable[[dict[str, Any], str | Path], None]) -> None:
        self.inner = inner
        self.completed = completed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint with the wrapped CheckpointIO."""
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint and complete it.

        Raises:
            RunFolderError: if it is damaged, or holds objects other than tensors and plain values.
            ConfigError: if it is a folder with sharded weights.
        """
        if "://" not in str(path) and Path(path).is_dir():
            raise ConfigError(
                f"the checkpoint {path} is a folder, of a run whose weights were split over devices: go on with the "
                "strategy that split them, ModelParallelStrategy, on any number of devices"
            )
        check_whole(path)
        try:
            checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise RunFolderError(
                f"the checkpoint {path} holds objects other than tensors and plain values, and reading these could run "
                f"any code ({str(error).splitlines()[0]}). If the checkpoint is your own, you can allow this: "
                "trainer.fit(..., weights_only=False), or --weights_only=false"
            ) from error
        self.completed(checkpoint, path)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Tear down the wrapped CheckpointIO."""
        self.inner.teardown()


def check_whole(path: str | Path) -> None:
    """Check that every part of a local checkpoint is what was saved.

    Raises:
        RunFolderError: if a part is damaged; names the part.
    """
    if "://" in str(path) or not Path(path).exists():
        return  # Lightning reads it, or raises that it is missing
    if reason := checkpoint_damage(Path(path)):
        raise RunFolderError(
            f"the checkpoint {path} is damaged: {reason}. Resume from an earlier one (--ckpt_path), or start "
            "again in another run folder"
        )
