"""What several devices share out, by arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsefit.planning import Measured, Work, predict

WORK = Work(10, 8, 512, 4, 2, 2048, max_steps=5, host=0.0)  # on GPUs
TENSORS = {"weights": 100.0, "gradients": 60.0, "moments": 120.0, "block": 7.0, "pruning": 110.0, "training": 400.0}


def measured(samples: int = 8) -> Measured:
    return Measured(
        10,
        samples,
        evaluations=3,
        # 3 s for each sample, and 50 s of solvers.
        seconds={"pruning": 50.0 + 3 * samples, "batch": 1.0, "update": 0.5, "evaluation": 1.0, "reconstruction": 7.0},
        peaks={"pruning": 500.0, "training": 900.0},
        tensors=TENSORS,
        counts={"all": 25, "pruned": 16, "train": 15},
    )


def on(devices: int, **settings):
    """The plan, a second run of the same size and a third of twice the samples being known."""
    return predict(replace(WORK, devices=devices, **settings), measured(), measured(), measured(16))


def test_under_ddp_each_device_holds_all_and_its_gradients_twice():
    plan = on(4)
    assert plan.peaks == {"pruning": 500, "training": 960}
    assert plan.least == pytest.approx(282)


def test_split_weights_leave_a_part_and_a_block_as_a_whole():
    plan = on(4, splits=True)
    assert plan.peaks["pruning"] == pytest.approx(432)  # of the weights, 75 lie on other devices
    assert plan.peaks["training"] == pytest.approx(704)  # with the gradients and moments, 210 do
    assert plan.least == pytest.approx(72)


def test_a_block_of_nearly_the_whole_model_saves_nothing():
    plan = predict(
        replace(WORK, devices=2, splits=True), replace(measured(), tensors=TENSORS | {"block": 99.0}), None, None
    )
    assert plan.peaks["pruning"] == 500


@pytest.mark.parametrize(("gram", "seconds"), [(True, 84.5), (False, 122)])
def test_devices_divide_the_solvers_and_the_samples(gram, seconds):
    plan = on(4, gram=gram, samples=72, state_bytes=1)  # 9 micro-batches, of which one device has 3
    stages = {stage.name: stage.seconds for stage in plan.stages}
    assert stages["calibration and pruning"] == pytest.approx(seconds)
    assert plan.peaks["pruning"] == 516
    assert stages["reconstruction"] == pytest.approx(21)


def test_fewer_micro_batches_than_devices_are_not_shared_out():
    stages = {stage.name: stage.seconds for stage in on(4, samples=24).stages}
    assert stages["calibration and pruning"] == pytest.approx(122)


def test_all_devices_train_and_all_are_paid():
    one, four = on(1), on(4)
    assert four.tokens["training"] == 4 * one.tokens["training"]
    assert four.tokens["calibration"] == one.tokens["calibration"]
    assert four.gpu_hours == pytest.approx(4 * one.gpu_hours)


def test_a_host_holds_the_model_as_it_is_read_or_what_an_undo_and_a_teacher_take():
    assert on(1, host=None).host is None
    assert on(1, host=1000.0).host == pytest.approx(1000 + 100)
    # Of 16 pruned weights of 4 bytes the masks, all values, and a copy of the dense model.
    assert on(1, host=1000.0, removed=1.0, taught=True).host == pytest.approx(1000 + 2 + 64 + 100)


def test_states_kept_on_the_host_are_not_on_the_device():
    device, host = (on(1, samples=72, state_bytes=10, states_on_host=kept) for kept in (False, True))
    assert device.peaks["pruning"] - host.peaks["pruning"] == (72 - 8) * 10
    assert host.host - device.host == pytest.approx(2 + 0.5 * 16 * 100 / 25 + 72 * 10 - 100)
