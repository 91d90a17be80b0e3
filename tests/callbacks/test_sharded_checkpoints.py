"""Checkpoints of models that FSDP2 has split over ranks, and runs that go on from them."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from resumed_runs import Stop, every_step, fit
from sharded_fits import ShardsItself, on_ranks, sharded, whole_weights
from small_runs import Classifier, labelled
from torch.utils.data import DataLoader, TensorDataset

from sparsefit.callbacks import GPUHourBudget, SparseCheckpoints
from sparsefit.callbacks.ledgers import budget_of
from sparsefit.data.image_loading import EpochSampler
from sparsefit.data.resumable import ResumableDataModule
from sparsefit.errors import ConfigError
from sparsefit.recovery.run_files import checkpoint_damage, damaged_files, newest_checkpoint

ROWS, STEPS = 24, 6


class Module(ShardsItself, Classifier):
    pass


class Loader(DataLoader):
    def __init__(self, share, position):
        x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(5))
        x[:, 0] = torch.arange(ROWS)
        samples = TensorDataset(x, torch.arange(ROWS) % 3)
        super().__init__(samples, 1, sampler=EpochSampler(ROWS, 1, seed=3, share=share))
        self.position = position

    def __iter__(self):
        self.sampler.start(self.position())
        return super().__iter__()


class Rows(ResumableDataModule):
    """Rows that are known by their first numbers."""

    def batches_in_epoch(self, ranks):
        return ROWS // ranks

    def train_dataloader(self):
        return Loader(self.rank_and_world_size(), self.position)


class Record(Callback):
    """What a rank begins with and trains on."""

    def __init__(self):
        self.rows, self.start = [], {}

    def on_train_start(self, trainer, pl_module):
        self.start = {"step": trainer.global_step, "hours": budget_of(trainer).ledger.hours}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(int(batch[0][0, 0]))


def train(ranks, folder, *more, checkpoint=None, one_file=False, told=None, **settings):
    """A fit of a rank: its weights, whole, and what was recorded."""
    record, module = Record(), Module()
    callbacks = [record, SparseCheckpoints(str(folder)), GPUHourBudget(10.0, warmup_steps=0), *more]
    settings = (
        sharded(ranks, save_distributed_checkpoint=not one_file) | {"max_epochs": 3, "max_steps": STEPS} | settings
    )
    fit(module, Rows(), *callbacks, ckpt_path=checkpoint, told=told, **settings)
    weights = {name: tensor.cpu() for name, tensor in whole_weights(module).items()}
    return {"weights": weights, "rows": record.rows, "start": record.start, "told": told}


def on_two(folder):
    results = {}
    for form in ("folder", "file"):
        place, one_file = folder / form, form == "file"
        saves = every_step(place / "checkpoints")
        results[form] = train(2, place, saves, one_file=one_file)
        results[f"{form} again"] = train(2, place, checkpoint=place / "checkpoints/step=3.ckpt", one_file=one_file)
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, on_ranks(2, on_two, folder)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_two_ranks_go_on_to_the_same_weights(two, form):
    _, ranks = two
    for rank in ranks:
        straight, again = rank[form], rank[f"{form} again"]
        assert again["start"]["step"] == 3
        assert again["rows"] == straight["rows"][3:]
        assert all(torch.equal(again["weights"][name], weight) for name, weight in straight["weights"].items())
