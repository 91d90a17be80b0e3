"""A LightningDataModule that saves and restores the position in its training data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from sparsefit.data.data_position import Place, Settings, check_same_data
from sparsefit.ranks import number_of_ranks, own_rank


class ResumableDataModule(LightningDataModule):
    """Saves the position in the training data, so that a resumed run continues with the batches it has not seen.

    The loader that `train_dataloader` returns must call `position` whenever it is iterated, and divide among the ranks
    what earlier numbers of ranks, `Place.before`, have left of the epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resumed_at = Place(0, 0)
        self._counted = 0  # batches that the loops count as done before the current number of ranks began
        self._epoch = 0  # the epoch that is being read

    @property
    def deciding(self) -> Settings:
        """The settings that decide which batches a position in the training data refers to."""
        return {}

    def batches_in_epoch(self, ranks: int) -> float:
        """The number of batches per rank in an epoch; infinite if the data are a stream."""
        return math.inf

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, and the settings that decide what it refers to."""
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
        """Convert a state that was saved with another number of ranks to the current number.

        The current ranks divide the rest of the epoch among themselves: nothing is trained on twice. `counted` in the
        result is the number of batches per rank that stands for what was done, rounded up to whole optimizer steps. If
        the data have a length, less than one step is left out of the epoch. If no step is left, the next epoch begins.

        Args:
            state_dict: The saved state.
            ranks: The number of ranks that saved it.
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
        """Check that the position in a saved state refers to the same batches in this run.

        Raises:
            ConfigError: if settings that decide it differ; names them. A state without settings is accepted.
        """
        if saved := state_dict.get("settings"):
            check_same_data(saved, self.deciding)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a saved state.

        Raises:
            ConfigError: as `check_resumable`, if training continues.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self.check_resumable(state_dict)
        # Lightning expects the position in the loader, and does not see that it is saved here
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        before = tuple((ranks, batches) for ranks, batches in state_dict.get("before", []))
        self._resumed_at = Place(state_dict.get("epoch", 0), state_dict.get("batches", 0), before)
        self._counted = state_dict.get("counted", 0)
        self._epoch = self._resumed_at.epoch

    def position(self) -> Place:
        """The position where a loader that is iterated now must start."""
        if self.trainer is not None and self.trainer.ckpt_path is None:  # a fit from the start, after a resumed one
            self._resumed_at, self._counted = Place(0, 0), 0
        resumed = self._resumed_at
        # a run resumed at the end of an epoch still counts that epoch when it requests the next one's data
        self._epoch = current = max(resumed.epoch, self.trainer.current_epoch if self.trainer is not None else 0)
        return resumed if current == resumed.epoch else Place(current, 0)

    def rank_and_world_size(self) -> tuple[int, int]:
        """The rank of this process and the number of processes."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return own_rank(), number_of_ranks()

    def _trained_in_epoch(self, ranks: int) -> float:
        """The number of batches per rank that the Trainer uses of an epoch."""
        batches = self.batches_in_epoch(ranks)
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        if isinstance(limit, float):
            return batches if limit == 1.0 or math.isinf(batches) else int(batches * limit)
        return batches if limit is None else min(batches, limit)
