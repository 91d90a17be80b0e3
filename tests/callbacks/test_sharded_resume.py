"""Runs of a recipe on a sharded model that go on from their checkpoints."""

from __future__ import annotations

import shutil

import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks
from resumed_runs import Stop, callbacks, data, every_step, fit, module
from sharded_fits import sharded, whole_weights

from sparsefit.callbacks.run_report import RunReport
from sparsefit.callbacks.trainer_lookup import masks_of
from sparsefit.errors import ConfigError
from sparsefit.recovery.run_files import damaged_files, newest_checkpoint

pytestmark = pytest.mark.slow

STEPS = 6
RESUMED = ("from the start", "from step 3", "its end again", "on one rank")


class Digest(Callback):
    """Of the masks at the end; and whether the model was pruned in this fit."""

    def on_train_end(self, trainer, pl_module):
        self.masks = masks_of(trainer)
        self.masks.verify(pl_module)


def train(folder, *more, checkpoint=None, ranks=2, **settings):
    """Fit on one rank and return the results."""
    trained, own, digest = module(form="masked_lora"), callbacks(folder / "run"), Digest()
    fit(trained, data(folder), *own, digest, *more, ckpt_path=checkpoint, **sharded(ranks, **settings), max_steps=STEPS)
    report = next(callback.report for callback in own if isinstance(callback, RunReport))
    return {"weights": whole_weights(trained), "digest": digest.masks.digest(), "report": report}


def files_of(folder):
    return {str(file.relative_to(folder)) for file in (folder / "run").rglob("*") if file.is_file()}


def remove(*folders):
    """By the first rank, while the others wait."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for folder in folders:
            shutil.rmtree(folder)
    torch.distributed.barrier()


def on_two(folder):
    settings, run = {"save_distributed_checkpoint": True}, folder / "run"
    with pytest.raises(ConfigError, match="stopped"):
        train(folder, Stop("on_train_batch_end", 2, ConfigError("stopped")), **settings)
    results = {"from the start": train(folder, checkpoint=newest_checkpoint(run), **settings)}
    remove(run)
    results["straight"] = train(folder, every_step(run / "checkpoints"), **settings)
    results["from step 3"] = train(folder, checkpoint=run / "checkpoints/step=3.ckpt", **settings)
    before = files_of(folder)
    remove(run / "model", run / "adapter")
    results["its end again"] = train(folder, checkpoint=run / "checkpoints/stage.ckpt", **settings)
    return results | {"missing": before - files_of(folder)}


def on_one(folder):
    checkpoint = folder / "run/checkpoints/step=3.ckpt"
    return train(folder, checkpoint=checkpoint, ranks=1, save_distributed_checkpoint=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of the first rank: the straight run, and those that go on from a checkpoint of it; and their folder."""
    folder = tmp_path_factory.mktemp("sharded")
    data(folder)
    results = on_ranks(2, on_two, folder)[0]
    damaged = damaged_files(folder / "run")
    return results | {"damaged": damaged, "on one rank": on_ranks(1, on_one, folder)[0]}


@pytest.mark.parametrize("resumed", RESUMED)
def test_a_sharded_run_continues_and_is_not_pruned_again(runs, resumed):
    straight, run = runs["straight"], runs[resumed]
    assert run["digest"] == straight["digest"]
    assert run["report"]["training"]["steps"] == STEPS
    assert run["report"]["status"] == "finished"
    stages = [result["report"]["gpu_hours"]["stages"]["calibration and pruning"] for result in (run, straight)]
    if resumed != "from the start":  # of the same pruning
        assert stages[0] == pytest.approx(stages[1])


@pytest.mark.parametrize("resumed", RESUMED[:-1])
def test_it_ends_with_the_same_weights_on_as_many_ranks(runs, resumed):
    differing = [
        name
        for name, weight in runs["straight"]["weights"].items()
        if not torch.equal(runs[resumed]["weights"][name], weight)
    ]
    assert not differing


def test_the_end_of_a_run_is_made_up_for(runs):
    assert not runs["missing"]
    assert not runs["damaged"]
