"""Checkpoints of models whose weights are split over devices by `ModelParallelStrategy` (FSDP2).

The strategy reads and writes them itself: a folder with a part from each device, which torch shares out anew among another
number of devices, or one file with all (`save_distributed_checkpoint=False`). It restores model and optimizer before
callbacks see the checkpoint, so nothing can be left out of it and filled up as it is read, and what is to be refused is
looked at before.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sparsefit.callbacks.checkpoint_io import check_whole
from sparsefit.callbacks.resuming import check_same_optimizers, check_same_run
from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.files import replacing
from sparsefit.ranks import from_all
from sparsefit.recovery.run_files import META_FILE
from sparsefit.recovery.same_recipe import check_same_recipe


def splits_weights(trainer: Trainer) -> bool:
    """Whether a trainer's checkpoints are of this kind."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_before_reading(trainer: Trainer, module: LightningModule, path: str | Path) -> None:
    """See that a fit can go on from a checkpoint, before anything of it is restored.

    Raises:
        RunFolderError: if it is damaged.
        ConfigError: if it is from another recipe, or leaves to the base of its run what it has.
    """
    damage = None
    if trainer.is_global_zero:
        try:
            check_whole(path)
        except RunFolderError as error:
            damage = str(error)
    if damage := from_all(damage)[0]:
        raise RunFolderError(damage)
    checkpoint = _read_beside_weights(Path(path))
    saved = checkpoint.get("sparsefit")
    if saved is None:
        return
    if saved["base"] is not None:
        raise ConfigError(
            f"the checkpoint {path} is of a run whose weights were not split over devices, and leaves to its base what "
            f"that has, which {type(trainer.strategy).__name__} cannot fill up: go on with strategy ddp or on one device"
        )
    check_same_run(checkpoint, saved, trainer, path)
    check_same_recipe(checkpoint, module, path, training=True)
    if saved.get("optimizers") is not None:
        check_same_optimizers(saved["optimizers"], trainer)


def save_aside(trainer: Trainer, path: Path) -> None:
    """Save a checkpoint, file or folder, that takes the place of another one once it is whole."""
    new = path.with_name(f"{path.name}.new")
    if trainer.is_global_zero:
        _remove(new)  # of a run that was killed
    trainer.strategy.barrier()
    trainer.save_checkpoint(new)
    if trainer.is_global_zero:
        if new.is_dir():
            with replacing(path) as place:
                for part in new.iterdir():
                    os.replace(part, place / part.name)
            _remove(new)
        else:
            os.replace(new, path)
    trainer.strategy.barrier()


def _read_beside_weights(path: Path) -> dict[str, Any]:
    """A checkpoint; where it is a folder, its weights have names and shapes alone."""
    if not path.is_dir():
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    checkpoint = torch.load(path / META_FILE, map_location="cpu", weights_only=True)
    parts, prefix = FileSystemReader(path).read_metadata().state_dict_metadata, "state_dict."
    checkpoint["state_dict"] = {
        name.removeprefix(prefix): torch.empty(part.size, device="meta")
        for name, part in parts.items()
        if name.startswith(prefix) and isinstance(part, TensorStorageMetadata)
    }
    return checkpoint


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
