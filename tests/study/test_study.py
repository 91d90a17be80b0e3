"""A study of one model: calibrated once, restored between points, going on where it was."""

from __future__ import annotations

import csv

import pytest
import torch
from subjects import finetune, subject

from sparsefit import PruningConfig, prune, register_score
from sparsefit.errors import CalibrationError, SparsefitError
from sparsefit.pruning.scores import SCORES
from sparsefit.study import Grid, Results, study

pytestmark = pytest.mark.figures

GRID = Grid(["magnitude", "wanda"], ["output", "layer"], [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results.csv", ["accuracy", "margin"])


def state_of(module):
    return {name: tensor.clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def assert_state(module, state):
    assert all(torch.equal(value, state[name]) for name, value in state_of(module).items())


@pytest.fixture
def broken_score():
    def explode(weight, squared_norm):
        if weight.shape == (32, 16):
            return weight.abs()
        raise RuntimeError("out of\nmemory")

    register_score("broken", explode, needs=("squared_norm",))
    yield "broken"
    del SCORES["broken"]


def test_one_calibration_pass_and_one_evaluation_a_point(results):
    net, data = subject()
    study(net, data, GRID.points(), results)
    assert data.calibrations == 1
    # One sample before anything is evaluated and one that shows what is reached, the micro-batches, and nothing else.
    assert net.module.runs == 2 + len(data.x) // 8
    assert net.module.evaluations == 1 + len(GRID.points()) == len(results.rows)
    assert net.calibration["samples"] == 64
    assert net.prunable == 3 * 2 * 16 * 32
    assert "head.weight" in net.left_dense


def test_each_point_is_the_pruning_of_a_fresh_model_and_the_model_is_dense_again(results):
    net, data = subject()
    before = state_of(net.module)
    study(net, data, GRID.points(), results)
    assert_state(net.module, before)
    for point in GRID.points():
        other, _ = subject()
        result = prune(other.module, [x for x, _ in data.calibration_dataloader()], point.config)
        row = results.find(model="net", stage="pruned", **point.key)
        assert row["digest"] == result.masks.digest()
        assert row["counted"] == pytest.approx(result.masks.sparsity)
        assert row["accuracy"] == pytest.approx(other.module.evaluate(data.test_dataloader())["accuracy"])


@pytest.mark.parametrize("wrong", ["none", "of another form"])
def test_wrong_calibration_data_are_reported_before_the_dense_model_is_evaluated(results, wrong):
    net, data = subject()
    batches = [] if wrong == "none" else [(torch.randn(4, 7), torch.ones(4))]
    data.calibration_dataloader = lambda seed: batches
    with pytest.raises((CalibrationError, RuntimeError)):
        study(net, data, GRID.points(), results)
    assert net.module.evaluations == 0
    assert not results.rows


def test_finetuned_points_are_measured_twice_and_all_is_put_back(results):
    net, data = subject(finetune=finetune, finetunes=lambda point: point.key["sparsity"] > 0.85, epochs=3)
    net.module.train()
    before, modes = state_of(net.module), [part.training for part in net.module.modules()]
    study(net, data, GRID.points(), results)
    tuned = [row for row in results.rows if row["stage"] == "finetuned"]
    assert len(tuned) == 8
    for row in tuned:
        pruned = results.find(**{name: row[name] for name in ("score", "granularity", "sparsity")}, stage="pruned")
        assert (row["epochs"], pruned["epochs"]) == (3, 0)
        assert row["digest"] == pruned["digest"]
        assert row["margin"] != pruned["margin"]
        assert row["counted"] == pytest.approx(pruned["counted"], abs=1e-3)
    assert_state(net.module, before)
    assert [part.training for part in net.module.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.module.parameters())


@pytest.mark.slow
def test_a_stopped_study_continues_where_it_was(tmp_path, results):
    points = GRID.points()
    whole, data = subject(finetune=finetune, epochs=1)
    study(whole, data, points, results)

    part = Results(tmp_path / "part.csv", results.metrics)
    stopped, data = subject(finetune=finetune, epochs=1)

    def stop(row):
        if len(part.rows) == 10:
            raise KeyboardInterrupt

    before = state_of(stopped.module)
    with pytest.raises(KeyboardInterrupt):
        study(stopped, data, points, part, stop)
    assert_state(stopped.module, before)

    again, data = subject(finetune=finetune, epochs=1)
    taken_up = Results(part.file, results.metrics)
    study(again, data, points, taken_up)
    assert again.module.evaluations == len(results.rows) - 10
    timed = ("selection_seconds", "evaluation_seconds", "finetuning_seconds")
    strip = [{name: value for name, value in row.items() if name not in timed} for row in taken_up.rows]
    assert strip == [{name: value for name, value in row.items() if name not in timed} for row in results.rows]

    done, data = subject(finetune=finetune, epochs=1)
    study(done, data, points, taken_up)
    assert (data.calibrations, done.module.evaluations) == (0, 0)


def test_a_point_that_fails_is_recorded_and_tried_again(results, broken_score):
    grid = Grid(["wanda", broken_score], ["layer"], [0.5, 0.6])
    net, data = subject()
    before = state_of(net.module)
    study(net, data, grid.points(), results)
    assert_state(net.module, before)
    failed = [row for row in results.rows if row["error"]]
    assert [row["score"] for row in failed] == [broken_score] * 2
    assert failed[0]["error"] == "RuntimeError: out of memory"
    assert failed[0]["accuracy"] is None
    assert len(results.rows) == 1 + 4

    SCORES[broken_score] = SCORES["wanda"]
    study(net, data, grid.points(), results)
    assert not any(row["error"] for row in results.rows)
    assert len(results.rows) == 1 + 4


def test_a_pattern_that_does_not_fit_fails_alone(results):
    net, data = subject()
    study(net, data, Grid(["wanda"], ["layer"], [0.5], ["2:4", "2:5"]).points(), results)
    assert [bool(row["error"]) for row in results.rows] == [False, False, False, True]
    assert "blocks.0" in results.rows[-1]["error"]


def test_failures_that_are_no_longer_asked_for_are_dropped_and_others_keep_their_place(results, broken_score):
    net, data = subject()
    study(net, data, Grid([broken_score, "wanda"], ["layer"], [0.5, 0.6]).points(), results)
    keys = [(row["score"], row["sparsity"]) for row in results.rows]
    SCORES[broken_score] = SCORES["wanda"]
    study(net, data, Grid([broken_score, "wanda"], ["layer"], [0.6]).points(), results)
    assert [(row["score"], row["sparsity"]) for row in results.rows] == [keys[0], *keys[2:]]
    assert not any(row["error"] for row in results.rows)


def test_the_order_that_was_really_used_is_reported(results):
    net, data = subject()
    for block in net.module.blocks:
        block.up.weight = net.module.blocks[0].up.weight  # blocks that share a weight cannot be pruned one by one
    study(net, data, Grid(["wanda"], ["layer"], [0.5], updates=["none", "block"]).points(), results)
    assert [(row["update"], row["used_update"]) for row in results.rows[1:]] == [("none", "none"), ("block", "none")]


def test_a_failed_finetuning_keeps_the_pruned_row(results):
    def fail(module, masks, seed):
        with torch.no_grad():
            module.head.weight.fill_(torch.nan)
        raise ValueError("no kernel")

    net, data = subject(finetune=fail, epochs=1)
    before = state_of(net.module)
    study(net, data, Grid(["wanda"], ["layer"], [0.5]).points(), results)
    assert [(row["stage"], row["error"]) for row in results.rows] == [
        ("dense", ""),
        ("pruned", ""),
        ("finetuned", "ValueError: no kernel"),
    ]
    assert_state(net.module, before)


def test_a_figure_that_is_nan_fails_the_point_and_the_dense_model(results):
    net, data = subject(finetune=lambda module, masks, seed: module.head.weight.data.fill_(torch.nan), epochs=1)
    study(net, data, Grid(["wanda"], ["layer"], [0.5]).points(), results)
    assert "margin is NaN" in results.rows[-1]["error"]
    net.module.head.weight.data.fill_(torch.nan)
    results.rows.clear()
    with pytest.raises(SparsefitError, match="margin is NaN"):
        study(net, data, Grid(["wanda"], ["layer"], [0.5]).points(), results)


def test_another_order_takes_passes_of_its_own(results):
    grid = Grid(["wanda"], ["output"], [0.5, 0.7], ["2:4"], ["none", "block"])
    net, data = subject()
    study(net, data, grid.points(), results)
    assert data.calibrations == 1 + 3
    for point in grid.points():
        other, _ = subject()
        own = prune(other.module, [x for x, _ in data.calibration_dataloader()], point.config)
        assert results.find(stage="pruned", **point.key)["digest"] == own.masks.digest()


def test_seeds_of_calibration_and_of_training_are_measured_apart(results):
    net, data = subject(finetune=finetune, epochs=1, seed=3, calibration_seeds=2, training_seeds=3)
    before = state_of(net.module)
    points = Grid(["magnitude", "wanda"], ["output"], [0.5]).points()
    study(net, data, points, results)
    assert_state(net.module, before)
    assert data.calibrations == 2
    seeds = [(row["score"], row["stage"], row["calibration_seed"], row["training_seed"]) for row in results.rows[1:]]
    assert sorted(seeds, key=str) == sorted(
        [
            ("magnitude", "pruned", "", ""),
            *(("magnitude", "finetuned", "", seed) for seed in (3, 4, 5)),
            *(("wanda", "pruned", seed, "") for seed in (3, 4)),
            *(("wanda", "finetuned", 3, seed) for seed in (3, 4, 5)),
        ],
        key=str,
    )
    wanda = {row["calibration_seed"]: row["digest"] for row in results.rows if row["score"] == "wanda"}
    assert wanda[3] != wanda[4]
    tuned = [row["margin"] for row in results.rows if row["stage"] == "finetuned"]
    assert len(set(tuned)) == 6
    again, data = subject(finetune=finetune, epochs=1, seed=3, calibration_seeds=2, training_seeds=3)
    study(again, data, points, Results(results.file, results.metrics))
    assert (data.calibrations, again.module.evaluations) == (0, 0)


def test_more_seeds_come_to_a_table_of_one_seed_and_leave_its_rows(results):
    points = Grid(["magnitude", "wanda"], ["layer"], [0.5]).points()
    once, data = subject(finetune=finetune, epochs=1)
    study(once, data, points, results)
    first = [dict(row) for row in results.rows]
    more, data = subject(finetune=finetune, epochs=1, calibration_seeds=2, training_seeds=2)
    study(more, data, points, results)
    assert results.rows[: len(first)] == first
    assert len(results.rows) == len(first) + 3  # Wanda calibrated again, and both fine-tuned again
    assert more.module.evaluations == 3


def test_a_table_without_seeds_is_taken_up_as_that_of_the_first_seed(results):
    points = Grid(["magnitude", "wanda"], ["layer"], [0.5]).points()
    settings = {"finetune": finetune, "epochs": 1}
    study(*subject(**settings), points, results)
    with results.file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = [name for name in rows[0] if not name.endswith("_seed")]
    with results.file.open("w", newline="") as lines:
        table = csv.DictWriter(lines, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    old = Results(results.file, results.metrics)
    net, data = subject(**settings)
    study(net, data, points, old)
    assert (data.calibrations, net.module.evaluations) == (0, 0)
    study(*subject(**settings, calibration_seeds=2), points, old)
    assert old.rows[: len(results.rows)] == results.rows
    assert Results(old.file, old.metrics).rows == old.rows


def test_calibration_that_does_not_depend_on_the_seed_is_refused(results):
    net, data = subject(calibration_seeds=2)
    draw = data.calibration_dataloader
    data.calibration_dataloader = lambda seed: draw(0)
    with pytest.raises(CalibrationError, match="same samples for the seeds 0 and 1"):
        study(net, data, Grid(["wanda"], ["layer"], [0.5]).points(), results)


def test_magnitude_alone_reads_no_data(results):
    net, data = subject()
    study(net, data, Grid(["magnitude"], ["layer"], [0.5]).points(), results)
    assert data.calibrations == 0
    assert results.rows[-1]["digest"] == prune(net.module, config=PruningConfig(score="magnitude")).masks.digest()
