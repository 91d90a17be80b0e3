"""Checkpoints of models that FSDP2 has split over ranks, and runs that go on from them."""

from __future__ import annotations

import os
import shutil
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks
from resumed_runs import Stop, every_step, fit
from sharded_fits import ShardsItself, sharded, whole, whole_weights
from small_runs import Classifier
from torch.utils.data import DataLoader, TensorDataset

from sparsefit.callbacks import GPUHourBudget, SparseCheckpoints
from sparsefit.callbacks.hooks import call_hook
from sparsefit.callbacks.trainer_lookup import budget_of
from sparsefit.cli.resuming import check_checkpoint
from sparsefit.data.image_loading import EpochSampler
from sparsefit.data.resumable_data import ResumableDataModule
from sparsefit.errors import ConfigError, SparsefitError
from sparsefit.recovery.run_files import checkpoint_damage, damaged_files, newest_checkpoint

pytestmark = pytest.mark.slow

ROWS, STEPS = 24, 6
FORMS = ("folder", "file")


class Module(ShardsItself, Classifier):
    pass


class FewerBlocks(Module):
    def __init__(self):
        super().__init__()
        del self.model.blocks[1]


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
    """What a rank begins with and trains on; has the end saved, as `RunReport` does."""

    def __init__(self):
        self.rows, self.start = [], {}

    def on_train_start(self, trainer, pl_module):
        self.start = {"step": trainer.global_step, "hours": budget_of(trainer).ledger.hours}
        self.start["weights"] = {name: weight.clone() for name, weight in whole_weights(pl_module).items()}
        self.start["momenta"] = [whole(state["exp_avg"]).clone() for state in trainer.optimizers[0].state.values()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(int(batch[0][0, 0]))

    def on_train_end(self, trainer, pl_module):
        call_hook(trainer, "on_closing", pl_module)


def train(folder, *more, checkpoint=None, warned=None, cls=Module, **settings):
    """A fit of a rank: its weights, whole, and what was recorded."""
    record, module = Record(), cls()
    callbacks = [record, SparseCheckpoints(str(folder)), GPUHourBudget(10.0, warmup_steps=0), *more]
    fit(module, Rows(), *callbacks, ckpt_path=checkpoint, warned=warned, **settings)
    return {"weights": whole_weights(module), "rows": record.rows, "start": record.start}


def refused(*args, **settings):
    try:
        train(*args, **settings)
    except SparsefitError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def damage(checkpoint, weight):
    """Changes a bit of a weight in the part of the second rank."""
    file = checkpoint / "__1_0.distcp"
    flip(file, file.read_bytes().index(weight.numpy().tobytes()))


def split(ranks, form, **settings):
    return sharded(ranks, save_distributed_checkpoint=form == "folder") | settings


def disk_full(folder, **settings):
    """What a fit says whose first rank cannot move a checkpoint into place."""

    def full(*_):
        raise OSError("No space left on device")

    with patch.object(os, "replace", os.replace if torch.distributed.get_rank() else full):
        try:
            train(folder, **settings)
        except Exception as error:
            return str(error)


def on_two(folder):
    results = {}
    for form in FORMS:
        place, more = folder / form, folder / f"more {form}"
        stop = Stop("on_train_batch_end", 2, ConfigError("stopped"))
        results["stopped"] = refused(place, stop, **split(2, form, max_steps=STEPS))
        stage, step = (place / f"checkpoints/{name}.ckpt" for name in ("stage", "step=3"))
        results[f"{form} from the start"] = train(more, checkpoint=stage, **split(2, form, max_steps=STEPS))
        results[form] = train(place, every_step(place / "checkpoints"), **split(2, form, max_steps=STEPS))
        results[f"{form} again"] = train(more, checkpoint=step, **split(2, form, max_steps=STEPS))
        if form == "folder":
            damaged = folder / "damaged.ckpt"
            if torch.distributed.get_rank() == 0:
                damage(
                    shutil.copytree(step, damaged),
                    results["folder again"]["start"]["weights"]["model.blocks.0.up.weight"][8:],
                )
            torch.distributed.barrier()
            results["damaged"] = refused(more, checkpoint=damaged, **split(2, form))
            results["fewer"] = refused(more, checkpoint=step, cls=FewerBlocks, **split(2, form))
            results["full disk"] = disk_full(folder / "full", **split(2, form, max_steps=STEPS))
    return results


def on_one(folder):
    results, warned = {}, []
    for form in FORMS:
        step = folder / form / "checkpoints/step=3.ckpt"
        results[form] = train(folder / "one", checkpoint=step, warned=warned, **split(1, form, max_epochs=1))
    return results | {"warned": warned}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs on two ranks: their folder, and what each rank has to say."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, on_ranks(2, on_two, folder)


@pytest.fixture(scope="module")
def one(two):
    """The rest of an epoch on one rank, after three steps on two."""
    return on_ranks(1, on_one, two[0])[0]


def test_a_checkpoint_that_cannot_be_moved_into_place_ends_all_ranks(two):
    first, second = (rank["full disk"] for rank in two[1])
    assert "cannot be written: No space left on device" in first
    assert second == f"on rank 0: {first}"


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_resume_to_the_same_weights(two, form):
    for rank in two[1]:
        straight, again = rank[form], rank[f"{form} again"]
        assert again["start"]["step"] == 3
        assert again["rows"] == straight["rows"][3:]
        assert all(torch.equal(again["weights"][name], weight) for name, weight in straight["weights"].items())


@pytest.mark.parametrize("form", FORMS)
def test_the_start_and_the_end_are_saved(two, form):
    folder, ranks = two
    for rank in ranks:
        straight, again = rank[form], rank[f"{form} from the start"]
        assert (again["start"]["step"], again["rows"]) == (0, straight["rows"])
        assert all(torch.equal(again["weights"][name], weight) for name, weight in straight["weights"].items())
    stage = newest_checkpoint(folder / form)
    assert stage.name == "stage.ckpt"
    assert torch.load(stage / "meta.pt" if stage.is_dir() else stage, weights_only=True)["global_step"] == STEPS
    assert not damaged_files(folder / form)
    assert not [path for path in stage.parent.iterdir() if path.suffix != ".ckpt"]


@pytest.mark.parametrize("form", FORMS)
def test_one_rank_resumes_a_run_of_two(two, one, form):
    straight, others = (rank[form] for rank in two[1])
    start = one[form]["start"]
    again = two[1][0][f"{form} again"]["start"]  # of what two ranks read from the same checkpoint
    assert start["step"] == 3
    assert start["hours"] > 0
    assert all(torch.equal(start["weights"][name], weight) for name, weight in again["weights"].items())
    assert start["momenta"]
    assert all(map(torch.equal, start["momenta"], again["momenta"]))
    assert sorted(straight["rows"][:3] + others["rows"][:3] + one[form]["rows"]) == [*range(ROWS)]


def test_one_warning_says_what_is_other(one):
    warnings = [text for text in one["warned"] if "from a run on 2 devices, and this one has 1" in text]
    assert len(warnings) == len(FORMS)
    assert "after what all 2 devices have trained on in this epoch" in warnings[0]


def test_another_model_and_damage_are_refused_by_all_ranks(two):
    for rank in two[1]:
        assert "model.blocks.1.up.weight is not in the model" in rank["fewer"]
        assert "is damaged: in its __1_0.distcp" in rank["damaged"]


def test_a_file_continues_where_nothing_is_split_and_a_folder_says_how(two, tmp_path):
    folder, _ = two
    alone = {"cls": Classifier, "max_epochs": 1}
    result = train(tmp_path, checkpoint=folder / "file/checkpoints/step=3.ckpt", **alone)
    assert result["start"]["step"] == 3
    assert len(result["rows"]) == ROWS - 6
    with pytest.raises(ConfigError, match="is a folder, of a run whose weights were split over devices"):
        train(tmp_path, checkpoint=folder / "folder/checkpoints/step=3.ckpt", **alone)


def test_damage_in_a_folder_is_found_and_a_half_written_one_is_none(two, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (3, 4, 5):
        shutil.copytree(two[0] / f"folder/checkpoints/step={step}.ckpt", checkpoints / f"step={step}.ckpt")
    (checkpoints / "step=5.ckpt/meta.pt").unlink()  # which is written last
    assert newest_checkpoint(tmp_path) == checkpoints / "step=4.ckpt"
    check_checkpoint(checkpoints / "step=4.ckpt")
    with pytest.raises(ConfigError, match=r"there is no checkpoint .*step=5\.ckpt"):
        check_checkpoint(checkpoints / "step=5.ckpt")
    for name in ("__1_0.distcp", "meta.pt", ".metadata"):
        path = shutil.copytree(checkpoints / "step=3.ckpt", tmp_path / name)
        assert checkpoint_damage(path) is None
        if name == ".metadata":
            (path / name).write_bytes((path / name).read_bytes()[:-30])
        else:
            flip(path / name, -400)
        assert name in checkpoint_damage(path)
