"""Checkpoints of models whose weights are sharded by `ModelParallelStrategy` (FSDP2).

The strategy reads and writes them itself: a folder with a part from each device, which torch can redistribute over
another number of devices, or a single file (`save_distributed_checkpoint=False`). It restores model and optimizer
before callbacks see the checkpoint. So nothing can be left out of it, and the checks that other checkpoints get when
they are read run after the restore, before any training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sparsefit.callbacks.checkpoint_io import check_whole
from sparsefit.callbacks.resume_checks import check_same_optimizers, check_same_run
from sparsefit.files import replacing
from sparsefit.ranks import errors_on_all_ranks
from sparsefit.recovery.recipe_checks import check_same_recipe


def splits_weights(trainer: Trainer) -> bool:
    """Whether the trainer's strategy is `ModelParallelStrategy`."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_read(trainer: Trainer, module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Check that a fit can resume from the checkpoint that the strategy has just loaded into its model.

    Args:
        trainer: The trainer of this run.
        module: Its module. The strategy has refused missing entries and other shapes already.
        checkpoint: The checkpoint without the state that the strategy has loaded.
        path: The path it was read from.

    Raises:
        RunFolderError: if it is damaged.
        ConfigError: if it is from another recipe, or from an optimizer of another class.
    """
    with errors_on_all_ranks():
        if trainer.is_global_zero:
            check_whole(path)
    saved = checkpoint.get("sparsefit")
    if saved is None:
        return
    check_same_run(checkpoint, saved, trainer, path)
    held = _shapes_in(Path(path)) if Path(path).is_dir() else module.state_dict()
    check_same_recipe({**checkpoint, "state_dict": held}, module, path, training=True)
    if saved.get("optimizers") is not None:
        check_same_optimizers(saved["optimizers"], trainer)


def save_aside(trainer: Trainer, path: Path) -> None:
    """Save a checkpoint, file or folder, next to `path`, and move it to `path` when it is complete."""
    new = path.with_name(f"{path.name}.new")
    with errors_on_all_ranks():
        if trainer.is_global_zero:
            _remove(new)  # left by a killed run
    trainer.save_checkpoint(new)
    with errors_on_all_ranks():
        if trainer.is_global_zero:
            _move(new, path)


def _move(new: Path, path: Path) -> None:
    if new.is_dir():
        with replacing(path) as place:
            for part in new.iterdir():
                os.replace(part, place / part.name)
        _remove(new)
    else:
        if path.is_dir():  # from a run that saved folders
            _remove(path)
        os.replace(new, path)


def _shapes_in(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder checkpoint, as meta tensors of their shapes."""
    parts, prefix = FileSystemReader(folder).read_metadata().state_dict_metadata, "state_dict."
    return {
        name.removeprefix(prefix): torch.empty(part.size, device="meta")
        for name, part in parts.items()
        if name.startswith(prefix) and isinstance(part, TensorStorageMetadata)
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
