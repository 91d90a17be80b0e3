"""What does not fit, and the setting to change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sparsefit.planning import Measured, Plan, Room, Work, blocks_within, plan_summary, unfit

GIB = 2**30
WORK = Work(2, 8, 512, 4, 2, 2048, max_steps=5)
PLAN = Plan(
    stages=[],
    step=1.0,
    steps=5,
    ends_by="max_steps",
    gpu_hours=0.1,
    least=GIB,
    peaks={"pruning": 2.0 * GIB, "training": 4.0 * GIB},
    host=None,
    counts={"all": 10.0, "pruned": 5.0, "train": 5.0},
    disk=3.0 * GIB,
    tokens={"calibration": 10.0, "training": 20.0},
    operations=1.0,
)
ROOM = Room(device=8 * GIB, host=8 * GIB, disk=8 * GIB, place="/data")


def test_what_fits_is_not_spoken_of():
    assert not [*unfit(PLAN, WORK, ROOM)]
    assert not [*unfit(PLAN, WORK, Room())]


@pytest.mark.parametrize(
    ("room", "stages"),
    [(3, ["training"]), (1, ["pruning", "training"])],
)
def test_each_stage_that_does_not_fit_names_its_settings(room, stages):
    said = [*unfit(PLAN, WORK, replace(ROOM, device=room * GIB))]
    assert [sentence.split()[0] for sentence in said] == stages
    settings = {"pruning": "pruning.micro_batch_size", "training": "gradient_checkpointing"}
    for sentence, stage in zip(said, stages, strict=True):
        assert settings[stage] in sentence
        assert f"of {room}.00 GiB memory" in sentence


def test_processes_on_a_cpu_share_its_memory_and_gpus_are_their_own():
    two = replace(WORK, devices=2)
    [said] = unfit(PLAN, two, replace(ROOM, device=7 * GIB, processes=2))
    assert "training takes 8.00 GiB (2 processes of 4.00 GiB) of 7.00 GiB" in said
    assert "ModelParallelStrategy" in said
    on_gpus = replace(PLAN, host=5.0 * GIB)
    [said] = unfit(on_gpus, two, replace(ROOM, device=7 * GIB, processes=2))
    assert said.startswith("2 x 5.00 GiB are held on the host, which has 8.00 GiB")
    assert "trainer.devices" in said


def test_split_weights_are_not_split_again():
    [said] = unfit(PLAN, replace(WORK, devices=2, splits=True), replace(ROOM, device=3 * GIB))
    assert "ModelParallelStrategy" not in said


def test_a_full_disk_names_the_folder():
    [said] = unfit(PLAN, WORK, replace(ROOM, disk=2 * GIB))
    assert said == "the run folder takes 3.00 GiB, and /data has 2.00 GiB: set run.folder"


def test_it_is_reported_and_so_is_a_budget_without_a_step():
    said = plan_summary(replace(PLAN, ends_by="budget", steps=0), WORK, ["the sky is low"])
    assert "DOES NOT FIT: the sky is low" in said
    assert any("raise budget.gpu_hours" in line for line in said)


@pytest.mark.parametrize(
    ("free", "host", "blocks"),
    [(Room(device=80), None, 8), (Room(device=80, disk=10), None, 2), (Room(80, 24), 5.0, 4), (Room(), None, math.inf)],
)
def test_a_miniature_takes_half_of_what_is_free(free, host, blocks):
    tensors, peaks = {"weights": 6.0}, {"pruning": 7.0, "training": 10.0}
    run = Measured(2, 8, 0, {}, peaks, tensors, {"all": 6.0, "pruned": 0.0}, disk=5.0)
    assert blocks_within(free, replace(WORK, host=host, taught=True), run) == blocks
