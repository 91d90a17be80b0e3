"""Runs on several ranks that go on from a checkpoint, on as many and on others."""

from __future__ import annotations

import json
import random
from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks
from resumed_runs import WORDS, assert_same, callbacks, data, every_step, fit, module, weights

from sparsefit.callbacks.trainer_lookup import budget_of

pytestmark = pytest.mark.slow

TWO, FOUR = ({"devices": ranks, "strategy": "ddp"} for ranks in (2, 4))
STEPS, EPOCH = {"max_steps": 6}, {"max_epochs": 1}


class Apart(Callback):
    """Lets each rank draw random numbers of its own from the first step on."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step == 0:
            torch.manual_seed(trainer.global_rank)


class Record(Callback):
    """Writes what each rank began with and trained on."""

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name
        self.windows, self.start, self.counts = [], {}, []

    def on_train_start(self, trainer, pl_module):
        budget = budget_of(trainer)
        state = trainer.optimizers[0].state_dict()["state"]
        self.start = {
            "hours": budget.ledger.hours,
            "pace": budget._step_times.step,
            "step": trainer.global_step,
            "trained": [float(p.detach().double().sum()) for p in pl_module.parameters() if p.requires_grad],
            "momenta": [float(entry["exp_avg"].double().sum()) for entry in state.values()],
        }

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.windows.append([tuple(window) for window in batch["input_ids"].tolist()])
        self.counts.append([trainer.global_step, batch_idx, trainer.optimizers[0].param_groups[0]["lr"]])

    def on_train_end(self, trainer, pl_module):
        end = {"windows": self.windows, "counts": self.counts, "start": self.start, "epochs": trainer.current_epoch}
        (self.folder / f"{self.name}-{trainer.global_rank}.json").write_text(json.dumps(end))


def recorded(folder, name):
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]


def windows_of(records, batches=None):
    """The windows of the first batches of each rank."""
    return [tuple(window) for one in records for window in chain(*one["windows"][:batches])]


def text(folder):
    """Documents of which no two windows are alike."""
    file, draw = folder / "long.jsonl", random.Random(0)
    if not file.exists():
        lines = (" ".join(draw.choices(WORDS, k=60)) for _ in range(24))
        file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return {"train_source": str(file), "val_source": str(file), "val_windows": 2}


def resume(folder, checkpoint, name, *more, **settings):
    trained = module()
    more = [*more, Record(folder, name), *callbacks(folder / "run")]
    fit(trained, data(folder, **text(folder)), *more, ckpt_path=folder / checkpoint, **settings)
    return weights(trained)


def go_on(folder, checkpoint, name, settings):
    resume(folder, checkpoint, name, **settings)


def straight_and_again(folder):
    """A run that is not interrupted, and one that goes on from its second step: their weights."""
    trained = module()
    more = [Apart(), Record(folder, "straight"), *callbacks(folder / "run"), every_step(folder / "run/checkpoints")]
    fit(trained, data(folder, **text(folder)), *more, **(TWO | STEPS))
    return weights(trained), resume(folder, "run/checkpoints/step=2.ckpt", "again", **(TWO | STEPS))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs on two ranks: their folder, and the weights of the straight one and of the other."""
    folder = tmp_path_factory.mktemp("ranks")
    text(folder)
    return folder, *on_ranks(2, straight_and_again, folder)[0]


@pytest.fixture(scope="module")
def epoch(two):
    """All windows of the first epoch."""
    loader = data(two[0], **text(two[0])).train_dataloader()
    windows = [tuple(window) for batch in loader for window in batch["input_ids"].tolist()]
    assert len(set(windows)) == len(windows) > 40
    return windows


@pytest.fixture(scope="module")
def alone(two):
    """The rest of the epoch on one rank, from step 3 on: its folder and warnings."""
    folder, *_ = two
    warned, saves = [], every_step(folder / "one")
    resume(folder, "run/checkpoints/step=3.ckpt", "one", saves, devices=1, strategy="auto", warned=warned, **EPOCH)
    return folder, warned


def test_two_ranks_resume_to_the_same_weights(two):
    folder, expected, again = two
    checkpoint = torch.load(folder / "run/checkpoints/step=2.ckpt", weights_only=True)
    mine, others = (state["torch"] for state in checkpoint["sparsefit"]["random"])
    assert checkpoint["sparsefit"]["world_size"] == 2
    assert not torch.equal(mine, others)
    assert_same(again, expected)


def test_one_rank_takes_what_two_have_left_of_the_epoch(alone, epoch):
    folder, _ = alone
    before, after = windows_of(recorded(folder, "straight"), 3), windows_of(recorded(folder, "one"))
    assert len(before) == 3 * 2 * 2
    assert sorted(before + after) == sorted(epoch)


def test_one_rank_resumes_a_run_of_two(alone):
    folder, _ = alone
    checkpoint = torch.load(folder / "run/checkpoints/step=3.ckpt", weights_only=True)
    (record,) = recorded(folder, "one")
    start, (state,) = record["start"], checkpoint["optimizer_states"]
    budget = checkpoint["callbacks"]["GPUHourBudget"]
    trained = [value for name, value in checkpoint["state_dict"].items() if "lora_" in name]
    assert start["trained"] == pytest.approx([float(value.double().sum()) for value in trained])
    assert start["momenta"] == pytest.approx(
        [float(entry["exp_avg"].double().sum()) for entry in state["state"].values()]
    )
    assert start["hours"] > sum(budget["ledger"]["hours"].values()) > 0
    assert budget["pace"]["steps"]
    assert start["pace"] == 0  # what a step takes on two devices says nothing about one
    steps, batches, _ = zip(*record["counts"], strict=True)
    assert steps == tuple(range(3, 3 + len(steps)))
    assert batches == tuple(range(6, 6 + len(steps)))  # three batches of two ranks are six of one


def test_one_warning_says_what_is_other(alone):
    _, warned = alone
    (warning,) = (message for message in warned if "devices" in message and "checkpoint" in message)
    assert "from a run on 2 devices, and this one has 1" in warning
    assert "averages 1 batches (1 devices x 1) where it averaged 2 (2 x 1)" in warning
    assert "after what all 2 devices have trained on in this epoch" in warning


def test_two_ranks_take_what_one_after_two_has_left(alone, epoch):
    folder, _ = alone
    on_ranks(2, go_on, folder, "one/step=6.ckpt", "two", TWO | EPOCH)
    first, second = recorded(folder, "two")
    assert len(first["windows"]) == len(second["windows"])
    assert [count[:2] for count in first["counts"][:2]] == [[6, 5], [7, 6]]  # nine batches of one rank are 4.5 of two
    before = windows_of(recorded(folder, "straight"), 3) + windows_of(recorded(folder, "one"), 3)
    seen = before + windows_of([first, second])
    assert len(set(seen)) == len(seen) > len(epoch) - 2  # the last round may be short of a window
    assert set(seen) <= set(epoch)


def test_four_ranks_take_what_two_have_left(alone, epoch):
    folder, _ = alone
    on_ranks(4, go_on, folder, "run/checkpoints/step=3.ckpt", "four", FOUR | EPOCH)
    records = recorded(folder, "four")
    assert len({len(record["windows"]) for record in records}) == 1
    assert len({tuple(record["start"]["trained"]) for record in records}) == 1
    seen = windows_of(recorded(folder, "straight"), 3) + windows_of(records)
    assert len(set(seen)) == len(seen) > len(epoch) - 4
    assert set(seen) <= set(epoch)
