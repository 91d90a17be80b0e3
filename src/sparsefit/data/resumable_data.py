"""A LightningDataModule that knows how far training has come."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from sparsefit.data.data_position import Place, Settings, check_same_data


class ResumableDataModule(LightningDataModule):
    """Saves the position in the training data, so that a resumed run goes on with the batches that it has not seen.

    The loader that `train_dataloader` returns must ask for `position` whenever it is iterated, and share out among the
    ranks what others, `Place.before`, have left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resumed_at = Place(0, 0)
        self._counted = 0  # batches that the loops count as done where the ranks of now begin
        self._epoch = 0  # the one that is read now

    @property
    def deciding(self) -> Settings:
        """The settings that decide which batches a position stands for."""
        return {}

    def batches_in_epoch(self, ranks: int) -> float:
        """Of each of so many ranks; infinity where the data are a stream."""
        return math.inf

    def state_dict(self) -> dict[str, Any]:
        """How far training has come, and the settings that decide what that means."""
        if self.trainer is None:
            return {}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = progress.current.processed
        last = progress.is_last_batch or progress.current.ready == self.trainer.num_training_batches
        ended = last and batches >= progress.current.ready
        settings = {name: list(pair) for name, pair in self.deciding.items()}
        if ended or self._epoch != self._resumed_at.epoch:
            place, counted = (Place(self._epoch + 1, 0) if ended else Place(self._epoch, batches)), 0
        else:
            counted = self._counted
            place = Place(self._epoch, batches - counted, self._resumed_at.before)
        others = {"before": [list(pair) for pair in place.before], "counted": counted} if place.before else {}
        return {"epoch": place.epoch, "batches": place.batches} | others | {"settings": settings}

    def share_anew(self, state_dict: Mapping[str, Any], ranks: int) -> dict[str, Any]:
        """What `state_dict` saved on another number of ranks, as those of now go on from it.

        They share out among themselves what of the epoch is left: nothing is trained on twice. `counted` in what is
        returned are the batches of each of them that stand for what was done, rounded up to whole optimizer steps:
        where the data have a length, less than that is left out of the epoch. Where no step of it is left, the next
        epoch begins.

        Args:
            state_dict: What was saved.
            ranks: By so many.
        """
        now = self.rank_and_world_size()[1]
        epoch, batches = state_dict.get("epoch", 0), state_dict.get("batches", 0)
        before = [*state_dict.get("before", []), [ranks, batches]] if batches else state_dict.get("before", [])
        step = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        counted = math.ceil(sum(many * each for many, each in before) / (now * step)) * step
        if counted >= self._trained_in_epoch(now):
            epoch, before, counted = epoch + 1, [], 0
        return {**state_dict, "epoch": epoch, "batches": 0, "before": before, "counted": counted}

    def check_resumable(self, state_dict: Mapping[str, Any]) -> None:
        """See that the position in what `state_dict` saved means the same batches here.

        Raises:
            ConfigError: if settings that decide it are others; names them. A state that knows none is taken as it is.
        """
        if saved := state_dict.get("settings"):
            check_same_data(saved, self.deciding)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` saved.

        Raises:
            ConfigError: as `check_resumable`, where training is to go on.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self.check_resumable(state_dict)
        # Lightning looks for the position in the loader, and does not see that it is kept here
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        before = tuple((ranks, batches) for ranks, batches in state_dict.get("before", []))
        self._resumed_at = Place(state_dict.get("epoch", 0), state_dict.get("batches", 0), before)
        self._counted = state_dict.get("counted", 0)
        self._epoch = self._resumed_at.epoch

    def position(self) -> Place:
        """Where a loader that starts now begins."""
        resumed = self._resumed_at
        # a run resumed at the end of an epoch still counts that one when it asks for the next one's data
        self._epoch = current = max(resumed.epoch, self.trainer.current_epoch if self.trainer is not None else 0)
        return resumed if current == resumed.epoch else Place(current, 0)

    def rank_and_world_size(self) -> tuple[int, int]:
        """Of this process."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _trained_in_epoch(self, ranks: int) -> float:
        """Batches of each rank that a Trainer takes of an epoch."""
        batches = self.batches_in_epoch(ranks)
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        if isinstance(limit, float):
            return batches if limit == 1.0 or math.isinf(batches) else int(batches * limit)
        return batches if limit is None else min(batches, limit)
