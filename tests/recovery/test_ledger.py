from __future__ import annotations

import io
import math

import pytest
import torch

from sparsefit.errors import ConfigError
from sparsefit.recovery.ledger import GPUHourLedger
from sparsefit.recovery.step_times import StepTimes, estimate_validation


class Clock:
    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float):
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_hours_are_wall_seconds_times_devices(clock):
    ledger = GPUHourLedger(clock=clock)
    ledger.start(devices=4)
    clock.pass_(1800)
    assert ledger.hours == pytest.approx(2.0)
    assert ledger.seconds == pytest.approx({"setup": 1800})


def test_nothing_is_charged_before_start_and_after_stop(clock):
    ledger = GPUHourLedger(clock=clock)
    clock.pass_(50)
    with ledger.stage("early"):
        clock.pass_(50)
    assert not ledger.started
    assert ledger.hours == 0
    ledger.start(devices=1)
    clock.pass_(36)
    ledger.stop()
    clock.pass_(50)
    with ledger.stage("late"):
        clock.pass_(50)
    assert ledger.stages == pytest.approx({"setup": 0.01})
    assert ledger.started
    assert not ledger.running
    ledger.start(devices=1)
    clock.pass_(36)
    assert ledger.hours == pytest.approx(0.02)


def test_a_second_start_neither_resets_nor_charges_twice(clock):
    ledger = GPUHourLedger(clock=clock)
    ledger.start(devices=2)
    clock.pass_(10)
    ledger.start(devices=2)
    clock.pass_(10)
    assert ledger.seconds == pytest.approx({"setup": 20})
    assert ledger.hours * 3600 == pytest.approx(40)


def test_each_start_charges_for_its_own_devices(clock):
    ledger = GPUHourLedger(clock=clock)
    ledger.start(devices=1)
    clock.pass_(10)
    ledger.stop()
    ledger.start(devices=2)
    clock.pass_(10)
    assert ledger.seconds == pytest.approx({"setup": 20})
    assert ledger.hours * 3600 == pytest.approx(10 + 20)


def test_the_innermost_stage_pays_and_the_base_stage_pays_for_the_rest(clock):
    ledger = GPUHourLedger(clock=clock)
    ledger.start(devices=1)
    clock.pass_(1)
    with ledger.stage("pruning"):
        clock.pass_(2)
        with ledger.stage("calibration"):
            clock.pass_(4)
            ledger.switch("training")
            clock.pass_(8)
            with ledger.stage("pruning"):
                clock.pass_(16)
        clock.pass_(32)
    clock.pass_(64)
    assert ledger.seconds == pytest.approx({"setup": 1, "pruning": 2 + 16 + 32, "calibration": 12, "training": 64})


def test_a_stage_ends_with_an_exception(clock):
    ledger = GPUHourLedger(clock=clock)
    ledger.start(devices=1)

    def fail():
        with ledger.stage("pruning"), ledger.stage("calibration"):
            clock.pass_(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.pass_(5)
    assert ledger.seconds == pytest.approx({"calibration": 3, "setup": 5})


def test_agreeing_raises_the_total_and_never_lowers_it(clock):
    ledger = GPUHourLedger(gpu_hours=10.0, clock=clock)
    ledger.start(devices=2)
    clock.pass_(1800)
    ledger.switch("training")
    ledger.agree(spent=1.5, limit=9.0)
    assert ledger.stages == pytest.approx({"setup": 1.0, "training": 0.5})
    assert ledger.seconds == pytest.approx({"setup": 1800, "training": 900})
    ledger.agree(spent=0.2, limit=9.0)
    assert ledger.hours == pytest.approx(1.5)


def test_it_affords_what_fits_below_the_limit():
    ledger = GPUHourLedger(gpu_hours=10.0)
    ledger.agree(spent=6.0, limit=8.0)
    assert ledger.left == 7200
    assert ledger.affords(7200)
    assert ledger.affords(7200 * (1 + 1e-12))  # the last digits of a sum
    assert not ledger.affords(7201)
    ledger.agree(spent=8.0, limit=8.0)
    assert not ledger.affords(0.0)


def test_without_a_budget_everything_is_afforded():
    assert GPUHourLedger().affords(1e9)


def test_a_share_is_one_of_what_was_left_when_it_was_asked_for_first(clock):
    ledger = GPUHourLedger(10.0, {"reconstruction": 0.25, "training": 0.75}, clock=clock)
    ledger.start(devices=1)
    ledger.agree(spent=1.0, limit=9.0)
    assert ledger.share("reconstruction") == pytest.approx(2.0 * 3600)
    ledger.agree(spent=2.5, limit=9.0)
    assert ledger.share("reconstruction") == pytest.approx(0.5 * 3600)
    assert ledger.share("training") == pytest.approx(6.5 * 3600)
    ledger.agree(spent=4.0, limit=9.0)
    assert ledger.share("reconstruction") == 0
    with pytest.raises(ConfigError, match=r"'pruning'.*'reconstruction' and 'training'"):
        ledger.share("pruning")
    # The next fit has shares of its own.
    ledger.stop()
    ledger.start(devices=1)
    assert ledger.share("reconstruction") == pytest.approx(1.25 * 3600)


def test_resume_adds_what_was_spent_here_to_the_saved_charge(clock):
    first = GPUHourLedger(clock=clock)
    first.start(devices=2)
    clock.pass_(3600)
    first.switch("training")
    clock.pass_(1800)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    clock.pass_(9999)  # between the save and the kill: charged to nobody

    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    later = Clock(5.0)
    second = GPUHourLedger(clock=later)
    second.start(devices=8)
    later.pass_(900)
    second.load_state_dict(state)
    assert second.stages == pytest.approx({"setup": 2.0 + 2.0, "training": 1.0})
    assert second.seconds == pytest.approx({"setup": 3600 + 900, "training": 1800})
    later.pass_(450)
    assert second.hours == pytest.approx(6.0)


def test_resume_in_the_same_process_does_not_charge_twice(clock):
    ledger = GPUHourLedger(clock=clock)
    ledger.start(devices=1)
    clock.pass_(3600)
    state = ledger.state_dict()
    clock.pass_(3600)
    ledger.stop()
    clock.pass_(3600)
    ledger.start(devices=1)
    clock.pass_(360)
    ledger.load_state_dict(state)
    assert ledger.hours == pytest.approx(1.1)


def test_a_saved_state_does_not_change_when_time_goes_on(clock):
    ledger = GPUHourLedger(clock=clock)
    ledger.start(devices=1)
    clock.pass_(36)
    state = ledger.state_dict()
    clock.pass_(36)
    assert ledger.hours == pytest.approx(0.02)
    assert state["hours"] == pytest.approx({"setup": 0.01})


def test_pace_expects_the_longest_of_the_last_ten():
    pace = StepTimes()
    pace.start(100.0, steps=7)
    assert (pace.step, pace.validation) == (0, 0)
    now = 100.0
    for step, seconds in enumerate([9.0, *[1.0] * 9], start=8):
        now += seconds
        assert pace.batch_ended(now, step)
        assert pace.step == pytest.approx(9)
    assert pace.batch_ended(now + 2, 18)
    assert pace.step == pytest.approx(2)


def test_pace_sums_the_batches_of_a_step_and_leaves_validation_out():
    pace = StepTimes()
    pace.start(0.0, steps=0)
    assert not pace.batch_ended(1.0, 0)
    pace.validation_ended(21.0)
    assert not pace.batch_ended(24.0, 0)
    assert pace.batch_ended(26.0, 1)
    assert (pace.step, pace.validation) == pytest.approx((1 + 3 + 2, 20))
    other = StepTimes()
    other.load_state_dict(pace.state_dict())
    assert (other.step, other.validation) == pytest.approx((6, 20))


def test_an_estimate_counts_until_a_validation_is_measured():
    pace = StepTimes()
    pace.validation_estimate = 50.0
    assert pace.validation == 50.0
    pace.start(0.0, steps=0)
    pace.validation_ended(20.0)
    assert pace.validation == 20.0


@pytest.mark.parametrize(
    ("marks", "batches", "expected"),
    [
        ([0, 10, 11, 11.5], 100, 11.5 + 98),  # the first batch's 9 extra seconds are not multiplied
        ([0, 2, 2], 5, 2 + 4 * 2),
        ([0, 3, 4, 4], 2, 4),
        ([0, 3, 4, 4], math.inf, 4),
        ([5, 6], 10, 1),
    ],
)
def test_estimate_validation(marks, batches, expected):
    assert estimate_validation(marks, batches) == pytest.approx(expected)


def test_seconds_and_hours_are_exchanged_at_the_number_of_devices(clock):
    ledger = GPUHourLedger(clock=clock)
    assert ledger.hours_of(1800) == 0.5
    ledger.start(devices=4)
    assert ledger.hours_of(1800) == 2.0
    assert ledger.seconds_of(2.0) == 1800


def test_switching_moves_what_follows_to_another_stage(clock):
    ledger = GPUHourLedger(clock=clock)
    ledger.start(devices=1)
    clock.pass_(10)
    ledger.switch("validation")
    clock.pass_(20)
    ledger.switch("setup")
    clock.pass_(30)
    assert ledger.seconds == pytest.approx({"setup": 40, "validation": 20})
