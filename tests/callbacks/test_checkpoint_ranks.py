"""Runs on two ranks that go on from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from resumed_runs import assert_same, callbacks, data, every_step, fit, module, weights

from sparsefit.errors import ConfigError

STEPS = 6
RANKS = {"devices": 2, "strategy": "ddp_spawn", "max_steps": STEPS}


class Apart(Callback):
    """Lets each rank draw random numbers of its own from the first step on."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step == 0:
            torch.manual_seed(trainer.global_rank)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run on two ranks that is not interrupted: its folder and weights."""
    folder = tmp_path_factory.mktemp("ranks")
    trained = module()
    more = [Apart(), *callbacks(folder / "run"), every_step(folder / "run/checkpoints")]
    fit(trained, data(folder), *more, **RANKS)
    return folder, weights(trained)


def resume(folder, step, **settings):
    trained = module()
    path = folder / f"run/checkpoints/step={step}.ckpt"
    fit(trained, data(folder), *callbacks(folder / "run"), ckpt_path=path, **(RANKS | settings))
    return weights(trained)


def test_two_ranks_go_on_to_the_same_weights(straight):
    folder, expected = straight
    checkpoint = torch.load(folder / "run/checkpoints/step=2.ckpt", weights_only=True)
    mine, others = (state["torch"] for state in checkpoint["sparsefit"]["random"])
    assert checkpoint["sparsefit"]["world_size"] == 2
    assert not torch.equal(mine, others)
    assert_same(resume(folder, 2), expected)


def test_one_rank_does_not_go_on_alone(straight):
    with pytest.raises(ConfigError, match="from a run on 2 devices, and this one has 1"):
        resume(straight[0], 2, devices=1, strategy="auto")
