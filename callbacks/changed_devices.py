"""Resuming from a checkpoint on another number of devices than it was saved on.

Model, masks, optimizer and the state of callbacks are the same on all devices and are restored unchanged. The per-rank
state is converted here when the checkpoint is read, as if it had been saved on the current number of devices: the
position in the data, the batch counts of the loops, and the random states.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparsefit.callbacks.lightning_loops import set_batches_done
from sparsefit.callbacks.resume_checks import data_name


def carry_over(checkpoint: dict[str, Any], saved: dict[str, Any], trainer: Trainer, path: str | Path) -> bool:
    """Convert a checkpoint to the current number of devices, with one warning that says what will differ.

    A datamodule with a method `share_anew` continues after the samples that all devices together have trained on. For
    other data, the number of batches done in the epoch is converted to the current devices, rounded down to whole
    optimizer steps; the state of their datamodule, if it has one, is restored as it is.

    Args:
        checkpoint: The checkpoint as it was read; changed in place.
        saved: What `SparseCheckpoints` added to it.
        trainer: The trainer of this run.
        path: The path it was read from.

    Returns:
        Whether it was saved on another number of devices.
    """
    then, now = saved["world_size"], trainer.world_size
    if then == now:
        return False
    place = "an epoch of the data begins"
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is not None and not saved["between_epochs"]:
        done = loops["epoch_loop.batch_progress"]["current"]["ready"]
        name = data_name(trainer, checkpoint)
        if name is not None and hasattr(trainer.datamodule, "share_anew"):
            state = checkpoint[name] = trainer.datamodule.share_anew(checkpoint[name], then)
            batches = state["counted"] if state["before"] else None
            place = (
                f"the data continue after what all {then} devices have trained on in this epoch, without repetition"
                if batches is not None
                else "what is left of this epoch is less than an optimizer step, and is left out"
            )
        else:
            step = trainer.accumulate_grad_batches
            batches = done * then // (now * step) * step
            place = (
                "the data cannot be redistributed (no datamodule with a method `share_anew`), so the rest of this "
                f"epoch, of which {batches} batches count as done, begins at the start of the data: some samples "
                "are seen twice, and some not at all"
            )
        set_batches_done(loops, batches)
        saved["between_epochs"] = batches is None
    for key in ("random", "training"):
        if key in saved:
            saved[key] = [saved[key][rank % then] for rank in range(now)]
    saved["world_size"] = now
    rank_zero_warn(
        f"The checkpoint {path} is from a run on {then} devices, and this one has {now}. Model, masks, optimizer, "
        f"learning rate and budget are restored, but training will differ from a run on {then}: "
        f"{_steps(saved, then, trainer)}; {place}; random numbers (dropout, augmentation) are drawn by other devices."
    )
    return True


def _steps(saved: Mapping[str, Any], then: int, trainer: Trainer) -> str:
    """Says how many batches an optimizer step averages now, and how many it averaged before."""
    each, was = trainer.accumulate_grad_batches, saved.get("accumulated")
    now = trainer.world_size * each
    if was is None:  # saved by an earlier version
        return f"an optimizer step averages {now} batches ({trainer.world_size} devices x {each})"
    if then * was == now:
        return f"an optimizer step averages {now} batches as before"
    return (
        f"an optimizer step averages {now} batches ({trainer.world_size} devices x {each}) where it averaged "
        f"{then * was} ({then} x {was}); set trainer.accumulate_grad_batches to make them equal"
    )
