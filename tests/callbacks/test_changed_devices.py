"""Runs resumed on another number of devices: a checkpoint of one device is changed to say that it is of two."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from resumed_runs import every_step, fit
from small_runs import Classifier, labelled
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Dataset as Samples

from sparsefit.callbacks import GPUHourBudget, SparseCheckpoints, WandaPruning
from sparsefit.data.image_loading import EpochSampler
from sparsefit.data.resumable_data import ResumableDataModule

ROWS = 10
RATE = 0.05


class Loader(DataLoader):
    def __init__(self, samples: Samples, position):
        super().__init__(samples, 1, sampler=EpochSampler(ROWS, 1, seed=3, share=(0, 1)))
        self.position = position

    def __iter__(self):
        self.sampler.start(self.position())
        return super().__iter__()


class Rows(ResumableDataModule):
    """Ten rows, each known by its first number."""

    def batches_in_epoch(self, ranks):
        return ROWS // ranks

    def train_dataloader(self):
        x = torch.arange(ROWS).float()[:, None].expand(ROWS, 6)
        return Loader(TensorDataset(x, torch.zeros(ROWS, dtype=torch.int64)), self.position)

    def val_dataloader(self):
        return labelled(4, seed=1)

    def calibration_dataloader(self):
        return labelled(8, seed=2)


class Course(Callback):
    """Notes the rows, the learning rates, the first batch's number and when there was a validation."""

    def __init__(self):
        self.rows, self.rates, self.numbers, self.validated = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(int(batch[0][0, 0]))
        self.numbers.append(batch_idx)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


class Validating(Classifier):
    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


def train(folder, data, checkpoint=None, *more, warned=None, **settings):
    course = Course()
    pruning = [WandaPruning(), SparseCheckpoints(str(folder)), GPUHourBudget(10.0, warmup_steps=0)]
    settings = {"max_epochs": 2} | settings
    fit(Validating(), data, course, *pruning, *more, ckpt_path=checkpoint, warned=warned, **settings)
    return course


def of_two_devices(path):
    checkpoint = torch.load(path, weights_only=True)
    mine = checkpoint["sparsefit"]
    mine |= {"world_size": 2, "random": mine["random"] * 2, "training": mine["training"] * 2}
    checkpoint["callbacks"]["GPUHourBudget"]["devices"] = 2
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """Saves one with so many batches done by each of two devices, and gives its path and the rows of each batch."""

    def save(batches, data=Rows):
        rows = train(tmp_path, data(), None, every_step(tmp_path), max_steps=batches).rows
        return of_two_devices(tmp_path / f"step={batches}.ckpt"), rows

    return save


def test_the_epoch_ends_where_its_data_do(tmp_path, checkpoint):
    path, _ = checkpoint(2)
    course = train(tmp_path, Rows(), path)
    assert course.numbers == [*range(4, ROWS), *range(ROWS)]
    assert len(set(course.rows[:6])) == 6
    assert sorted(course.rows[6:]) == [*range(ROWS)]
    assert course.validated == [8, 18]


def test_the_learning_rate_falls_on_from_where_it_was(tmp_path, checkpoint):
    path, _ = checkpoint(2)
    course = train(tmp_path, Rows(), path)
    # Four of the twenty batches of two epochs are done, by two steps; sixteen steps are left.
    assert course.rates == pytest.approx([RATE * (1 - done / 20) for done in range(4, 20)])
    again = train(tmp_path, Rows(), path, max_steps=6)
    assert again.rates == pytest.approx([RATE * (1 - step / 6) for step in range(2, 6)])


def test_steps_are_whole_and_what_cannot_make_one_is_left_out(tmp_path, checkpoint):
    path, _ = checkpoint(2)
    course = train(tmp_path, Rows(), path, accumulate_grad_batches=3, max_epochs=1)
    assert course.numbers == [6, 7, 8, 9]
    assert len(course.rates) == 2  # of three batches, and of the last one
    warned = []
    path, _ = checkpoint(4)
    course = train(tmp_path, Rows(), path, warned=warned, accumulate_grad_batches=5)
    assert course.numbers == [*range(ROWS)]
    assert any("what is left of this epoch is less than an optimizer step, and is left out" in text for text in warned)


def test_between_epochs_nothing_is_left_out_or_comes_twice(tmp_path, checkpoint):
    path, _ = checkpoint(ROWS)
    course = train(tmp_path, Rows(), path)
    assert sorted(course.rows) == [*range(ROWS)]


class OfOnesOwn(Rows):
    """A custom data module without positions or state."""

    share_anew = None
    state_dict = dict

    def train_dataloader(self):
        return DataLoader(super().train_dataloader().dataset, 1, shuffle=True)


def test_data_that_know_no_position_begin_at_their_start(tmp_path, checkpoint):
    warned = []
    path, _ = checkpoint(2, OfOnesOwn)
    course = train(tmp_path, OfOnesOwn(), path, warned=warned)
    assert course.numbers == [*range(4, ROWS), *range(ROWS)]
    assert course.validated == [8, 18]
    (warning,) = (text for text in warned if "from a run on 2 devices, and this one has 1" in text)
    assert "the data cannot be redistributed" in warning
    assert "of which 4 batches count as done" in warning
