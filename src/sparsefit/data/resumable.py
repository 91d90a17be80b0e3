"""A LightningDataModule that knows how far training has come."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from sparsefit.data.position import Settings, check_same_data


class ResumableDataModule(LightningDataModule):
    """Saves the position in the training data, so that a resumed run goes on with the batches that it has not seen.

    The loader that `train_dataloader` returns must ask for `position` whenever it is iterated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resumed_at = (0, 0)
        self._epoch = 0  # the one that is read now

    @property
    def deciding(self) -> Settings:
        """The settings that decide which batches a position stands for."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """How far training has come, and the settings that decide what that means."""
        if self.trainer is None:
            return {}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = progress.current.processed
        last = progress.is_last_batch or progress.current.ready == self.trainer.num_training_batches
        ended = last and batches >= progress.current.ready
        settings = {name: list(pair) for name, pair in self.deciding.items()}
        position = {"epoch": self._epoch + 1, "batches": 0} if ended else {"epoch": self._epoch, "batches": batches}
        return position | {"settings": settings}

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
        self._resumed_at = (state_dict.get("epoch", 0), state_dict.get("batches", 0))
        self._epoch = self._resumed_at[0]

    def position(self) -> tuple[int, int]:
        """(epoch, batches of it that are done) for a loader that starts now."""
        epoch, batches = self._resumed_at
        # a run resumed at the end of an epoch still counts that one when it asks for the next one's data
        self._epoch = current = max(epoch, self.trainer.current_epoch if self.trainer is not None else 0)
        return current, batches if current == epoch else 0

    def rank_and_world_size(self) -> tuple[int, int]:
        """Of this process."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
