from __future__ import annotations

from dataclasses import replace

import pytest

from sparsefit.planning import GPUS, Measured, Shape, Work, estimated, predict

WORK = Work(
    blocks=30,
    samples=32,
    sample_tokens=512,
    test_batches=10,
    batches_in_step=2,
    batch_tokens=2048,
    max_steps=50,
)


def measured(blocks: int, samples: int = 8) -> Measured:
    """A machine on which everything is a line: 3 s once and 0.5 s for each block of a batch, ..."""
    return Measured(
        blocks,
        samples,
        evaluations=4,
        seconds={
            "pruning": 1.0 + blocks * (0.5 + 0.25 * samples),
            "reconstruction": blocks * 0.5 * samples,
            "evaluation": 1.0 + 0.1 * blocks,
            "batch": 3.0 + 0.5 * blocks,
            "update": 0.5 + 0.01 * blocks,
            "export": 2.0 + blocks,
        },
        # What a process holds is no line; that of its tensors is.
        peaks={"pruning": 100.0 + 10 * blocks + 3 * blocks**2, "training": 200.0 + 40 * blocks},
        tensors={"pruning": 10.0 * blocks, "training": 40.0 * blocks},
        counts={"all": 1000.0 + 100 * blocks, "pruned": 70.0 * blocks, "train": 80.0 * blocks},
        disk=500.0 + 9 * blocks,
    )


@pytest.mark.parametrize(("few", "more"), [(2, 3), (2, 4), (1, 30)])
def test_what_grows_by_the_block_is_predicted_exactly(few, more):
    plan = predict(WORK, measured(few), measured(more), measured(more, samples=16))
    assert {stage.name: stage.seconds for stage in plan.stages} == pytest.approx(
        {
            "evaluation": 4 * 10 * 4.0,
            "calibration and pruning": 1 + 30 * (0.5 + 0.25 * 32),
            "reconstruction": 30 * 0.5 * 32,
            "training": 50 * (2 * 18 + 0.8),
            "export": 32,
        }
    )
    assert plan.step == pytest.approx(36.8)
    assert plan.peaks == pytest.approx({"pruning": 400 + 3 * more**2, "training": 1540})  # 1400, grown by 0.10
    assert plan.counts == pytest.approx({"all": 4000, "pruned": 2100, "train": 2400})
    assert plan.disk == pytest.approx(770)
    assert plan.gpu_hours == pytest.approx(sum(stage.seconds for stage in plan.stages) / 3600)
    # Two passes over the calibration samples; three, for a forward and a backward pass, over the trained tokens.
    assert plan.operations == pytest.approx(2 * 4000 * (2 * 32 * 512 + 3 * 50 * 2 * 2048))


def test_the_passes_of_an_allocation_are_counted():
    work = Work(30, 32, 512, 10, 2, 2048, 50)
    plain, more = (predict(w, measured(2), measured(4)) for w in (work, replace(work, forwards=6)))
    assert more.operations - plain.operations == pytest.approx(2 * 4000 * 4 * 32 * 512)


SIZES = {"all": 4000.0, "pruned": 2100.0, "train": 2400.0}


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("element", [2, 4])
def test_gradients_of_one_calibration_sample_need_memory(taught, element):
    work = Work(30, 32, 512, 10, 2, 2048, 50, state_bytes=5)
    shape = Shape(16, 100, 4, activation_bytes=element, checkpointing=True, taught=taught)
    plain, more = (
        estimated(w, SIZES, shape, GPUS["h100"], 0, 1).peaks["pruning"] for w in (work, replace(work, gradients=True))
    )
    assert plain == 4 * 4000 + 32 * 5
    # Logits in the elements of the model, and four times in float32.
    assert more == 4 * 4000 + 2100 + 17 * element * 30 * 512 * 16 + 512 * 100 * (element + 16)


def test_activations_take_the_bytes_of_their_elements():
    shapes = [Shape(16, 100, 4, activation_bytes=element) for element in (2, 4)]
    half, single = (estimated(WORK, SIZES, shape, GPUS["h100"], 0, 1).peaks["training"] for shape in shapes)
    assert half == 4 * (4000 + 3 * 2400) + 34 * 30 * 2048 * 16 + 2048 * 100 * 10
    assert single - half == 34 * 30 * 2048 * 16 + 2048 * 100 * 2


@pytest.mark.parametrize("state_bytes", [5, 10**6])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("on_host", [False, True])
def test_each_device_takes_gradients_or_holds_the_states_of_its_samples(state_bytes, devices, on_host):
    work = Work(30, 32, 512, 10, 2, 2048, 50, state_bytes=state_bytes, devices=devices, gradients=True)
    work = replace(work, states_on_host=on_host)
    plan = predict(work, estimated(work, SIZES, Shape(16, 100, 2), GPUS["h100"], 0, 1))
    backward = 2100 + 34 * 30 * 512 * 16 + 512 * 100 * 18
    states = 0 if on_host else 32 // devices * state_bytes
    assert plan.peaks["pruning"] == pytest.approx(2 * 4000 + max(backward, states))


def test_measured_gradients_grow_with_the_blocks():
    def with_gradients(blocks, samples=8):
        whole = measured(blocks, samples)
        return replace(whole, tensors={**whole.tensors, "backward": 100.0 + 20 * blocks})

    few, more = measured(2), measured(4)
    plain = predict(WORK, few, more).peaks["pruning"]
    taken = predict(WORK, with_gradients(2), with_gradients(4)).peaks["pruning"]
    assert taken - plain == pytest.approx(26 * 20)
    # Hidden states of all samples, of which the miniatures held eight.
    work = replace(WORK, state_bytes=50)
    states = predict(work, with_gradients(2), with_gradients(4)).peaks["pruning"]
    assert states - plain == pytest.approx(32 * 50 - max(8 * 50, 180))


def test_a_model_whose_blocks_cannot_be_counted_is_measured_whole():
    work = Work(1, 8, 1, 10, 1, 1, max_steps=10)
    plan = predict(work, measured(1))
    assert plan.counts["all"] == 1100
    assert plan.step == pytest.approx(3.5 + 0.51)
    # Its calibration samples are some of many, too.
    plan = predict(replace(work, samples=32), measured(1), None, measured(1, 16))
    [pruning] = [stage.seconds for stage in plan.stages if stage.name == "calibration and pruning"]
    assert pruning == pytest.approx(1 + 0.5 + 0.25 * 32)


@pytest.mark.parametrize(("devices", "gpu_hours"), [(1, 1.0), (2, 2.0)])
def test_the_budget_pays_for_steps_with_what_the_other_stages_leave(devices, gpu_hours):
    work = Work(30, 8, 512, 10, 2, 2048, max_steps=None, gpu_hours=gpu_hours, reserve=0.05, devices=devices)
    plan = predict(work, measured(2), measured(4))
    assert plan.ends_by == "budget"
    # 160 s of evaluations, 76 s of pruning, 120 s of reconstruction and 32 s of export leave 3212 s for 36.8 s each.
    assert plan.steps == 87
    assert plan.gpu_hours <= gpu_hours
    less = predict(Work(30, 8, 512, 10, 2, 2048, None, gpu_hours=0.01), measured(2), measured(4))
    assert (less.steps, less.ends_by) == (0, "budget")


def test_the_reserve_is_kept_even_where_the_end_takes_less():
    quick = Measured(2, 8, 1, {"pruning": 0.0, "batch": 1.0, "update": 0.0}, counts={"all": 1.0})
    plan = predict(Work(2, 8, 1, 1, 1, 1, None, gpu_hours=100 / 3600, reserve=0.2), quick)
    assert plan.steps == 80


def test_max_steps_may_end_it_first():
    work = Work(30, 8, 512, 10, 2, 2048, max_steps=3, gpu_hours=100.0)
    plan = predict(work, measured(2), measured(4))
    assert (plan.steps, plan.ends_by) == (3, "max_steps")


def test_states_data_and_libraries_are_added_to_the_memory():
    work = Work(30, 32, 512, 10, 2, 2048, 50, state_bytes=5, held=1000.0)
    plan = predict(work, measured(2), measured(4), measured(4, 16))
    assert plan.peaks == pytest.approx({"pruning": 1568, "training": 2640})  # 2400, grown by 0.10
    on_gpu = predict(replace(work, host=0.0), measured(2), measured(4), measured(4, 16))
    assert on_gpu.peaks["training"] == pytest.approx(1000 + 1400)


def test_reading_belongs_to_its_stage_and_the_control_to_no_budget():
    work = Work(30, 8, 512, 10, 2, 2048, 50, reading={"pruning": 7.0, "evaluation": 9.0}, control=True)
    plan, plain = (predict(w, measured(2), measured(4)) for w in (work, replace(work, reading={}, control=False)))
    seconds, before = ({stage.name: stage.seconds for stage in p.stages} for p in (plan, plain))
    assert seconds["calibration and pruning"] - before["calibration and pruning"] == pytest.approx(7)
    assert seconds["evaluation"] - before["evaluation"] == pytest.approx(9)
    assert seconds["control"] == pytest.approx(before["training"] + 10 * 4.0)


def test_noise_that_falls_with_the_blocks_is_taken_as_level():
    noisy = replace(measured(4), seconds={**measured(4).seconds, "batch": 2.0})
    assert predict(WORK, measured(2), noisy).step == pytest.approx(2 * 2.0 + 0.8)


def with_validation(blocks: int) -> Measured:
    whole = measured(blocks)
    return replace(whole, seconds={**whole.seconds, "validation": 2.0, "task item": 0.5}, task_stages=4)


def test_validations_and_tasks_are_stages_of_their_own():
    work = replace(WORK, val_batches=3, val_every=20, task_items=100)
    plan = predict(work, with_validation(2), with_validation(4))
    stages = {stage.name: stage for stage in plan.stages}
    # After 20 and 40 of 50 steps, and at the end.
    assert (stages["validation"].what, stages["validation"].seconds) == ("3 x 3 batches", pytest.approx(3 * 6.0))
    assert stages["zero-shot tasks"].seconds == pytest.approx(4 * 100 * 0.5)


def test_a_budget_pays_for_its_validations():
    work = replace(WORK, max_steps=None, gpu_hours=1.5, val_batches=3, val_every=4)
    plan = predict(work, with_validation(2), with_validation(4))
    # Of 5400 s, 748 are for the other stages and 6 for the last validation; a step takes 36.8 s, and 1.5 of validation.
    assert plan.steps == 121
    assert plan.gpu_hours <= 1.5


def test_no_step_has_no_validation():
    plan = predict(replace(WORK, max_steps=0, val_batches=3), with_validation(2), with_validation(4))
    assert not {"validation", "training"} & {stage.name for stage in plan.stages}


def test_a_taught_run_has_a_control_without_its_teacher():
    plan, taught = (predict(replace(WORK, control=True, taught=t), measured(2), measured(4)) for t in (False, True))
    batches = 50 * 2 * 18.0
    assert plan.stages[-1].seconds - taught.stages[-1].seconds == pytest.approx(batches / 4)


def test_the_limit_is_called_by_its_name():
    assert predict(replace(WORK, limited_by="max_epochs"), measured(2)).ends_by == "max_epochs"
