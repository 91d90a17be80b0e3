from __future__ import annotations

import math

import pytest
from study_rows import plain, pruned, row, vision_study

from sparsefit.reporting.study_differences import differences
from sparsefit.reporting.study_page import render_study
from sparsefit.reporting.study_results import per
from sparsefit.reporting.study_table import change, results_table

ONE = vision_study(("deit",))


def told(study, rows):
    """The cells of each comparison, by stage and what is compared."""
    return {
        (row.model, row.stage, row.compared): {amount: plain(cell) for amount, cell in row.cells.items()}
        for row in differences(study, rows).rows
    }


def seeds(values, name="calibration_seed", **known):
    """A run of a point for each value, with seeds 0, 1, ..."""
    return [pruned(**known, accuracy=value, **{name: str(seed)}) for seed, value in enumerate(values)]


def test_the_best_of_a_row_and_stage_is_marked():
    rows = [row("deit", accuracy=0.8)]
    values = {"magnitude": (0.5, 0.7), "wanda": (0.6, 0.7), "ria": (0.55, 0.6)}
    for score, (before, after) in values.items():
        rows += [pruned(score, accuracy=before), pruned(score, stage="finetuned", epochs=1, accuracy=after)]
    (table,) = results_table(ONE, rows)
    assert [cell.best for cell in table.rows[0][1]] == [False, True, False, True, True, False]
    assert [plain(cell.change) for cell in table.rows[0][1]][:2] == ["-30.00", "-20.00"]
    assert [column.stage for column in table.columns] == ["pruned"] * 3 + ["after 1 epoch"] * 3
    lowest = ONE | {"metrics": {"accuracy": "lower"}}
    assert [cell.best for cell in results_table(lowest, rows)[0].rows[0][1]][:3] == [True, False, False]


def test_patterns_stand_among_the_sparsities_where_each_score_has_one_granularity():
    rows = [pruned(sparsity=0.4, accuracy=0.7), pruned(accuracy=0.6), pruned(sparsity=0.6, accuracy=0.5)]
    rows.append(pruned(granularity="", pattern="2:4", accuracy=0.55))
    (table,) = results_table(ONE, rows)
    assert [(amount, shown[0].value) for amount, shown in table.rows] == [
        ("40%", 0.7),
        ("50%", 0.6),
        ("2:4", 0.55),
        ("60%", 0.5),
    ]
    free, patterns = results_table(ONE, [*rows, pruned(granularity="output", accuracy=0.3)])
    assert [amount for amount, _ in free.rows] == ["40%", "50%", "60%"]
    assert [(amount, [cell.value for cell in shown]) for amount, shown in patterns.rows] == [("2:4", [0.55])]


@pytest.mark.parametrize(
    ("metric", "value", "dense", "told"),
    [
        ("accuracy", 0.75, 0.8, "-5.00"),
        ("top5_accuracy", 0.81, 0.8, "+1.00"),
        ("perplexity", 12.5, 10.0, "+2.50"),
        ("perplexity", 150.0, 10.0, "x15"),
        ("perplexity", math.inf, 10.0, ""),
        ("f1", 0.5, 0.75, "-0.25"),
        ("accuracy", None, 0.8, ""),
        ("accuracy", 0.8, None, ""),
    ],
)
def test_a_change_is_told_in_the_units_of_its_metric(metric, value, dense, told):
    assert plain(change(metric, value, dense)) == told


@pytest.mark.parametrize(
    ("granularity", "told"),
    [
        ("layer", "per layer"),
        ("(input, 4)", "per 4 inputs"),
        ("output:128", "per 128 outputs"),
        ("variant", "variant"),
        ("", ""),
    ],
)
def test_granularities_read_as_words(granularity, told):
    assert per(granularity) == told


def test_of_rows_of_one_point_the_last_counts():
    rows = [pruned(accuracy=None, error="out of memory"), pruned(accuracy=0.7)]
    assert results_table(ONE, rows)[0].rows[0][1][0].value == 0.7
    assert "out of memory" not in render_study(ONE, rows)


def test_scores_granularities_and_orders_are_compared_with_the_first_of_each():
    rows = [row("deit", accuracy=0.8)]
    for sparsity, magnitude, output, layer in ((0.5, 0.7, 0.75, 0.78), (0.6, 0.75, 0.76, 0.75)):
        rows.append(pruned("magnitude", sparsity, accuracy=magnitude))
        rows.append(pruned("wanda", sparsity, granularity="output", accuracy=output))
        rows.append(pruned("wanda", sparsity, accuracy=layer))
    rows += [pruned(s, granularity="", pattern="2:4", accuracy=v) for s, v in (("magnitude", 0.6), ("wanda", 0.62))]
    assert told(ONE, rows) == {
        ("deit", "pruned", "wanda against magnitude, per layer"): {"50%": "+8.00", "60%": "+0.00", "2:4": "+2.00"},
        ("deit", "pruned", "per layer against per output, wanda"): {"50%": "+3.00", "60%": "-1.00"},
    }
    found = differences(ONE, rows)
    assert (found.title, found.amounts) == ("Single-run differences", ["50%", "2:4", "60%"])
    assert "no spread" in found.note


def test_a_perplexity_is_compared_in_per_cent_and_an_infinite_one_is_not():
    study = ONE | {"metrics": {"perplexity": "lower"}}
    rows = [pruned("magnitude", 0.5, perplexity=20.0), pruned("magnitude", 0.6, perplexity=math.inf)]
    rows += [pruned("wanda", s, granularity="output", perplexity=10.0) for s in (0.5, 0.6)]
    assert told(study, rows) == {("deit", "pruned", "wanda per output against magnitude per layer"): {"50%": "-50.0%"}}


def test_models_of_different_metrics_are_compared_apart():
    study = {"metrics": {"accuracy": "higher", "perplexity": "lower"}}
    rows = [pruned(s, model="net", accuracy=v) for s, v in (("magnitude", 0.4), ("wanda", 0.5))]
    rows += [pruned(s, model="text", perplexity=v) for s, v in (("magnitude", 20.0), ("wanda", 40.0))]
    compared = "wanda against magnitude, per layer"
    assert told(study, rows) == {
        ("net", "pruned", compared): {"50%": "+10.00"},
        ("text", "pruned", compared): {"50%": "+100.0%"},
    }
    assert [(table.model, table.metric) for table in results_table(study, rows)] == [
        ("net", "accuracy"),
        ("text", "perplexity"),
    ]
    assert "Also measured" not in render_study(study, rows)


def test_orders_are_compared_where_they_were_really_used():
    rows = [pruned(sparsity=s, update="none", used_update="none", accuracy=0.6) for s in (0.5, 0.6)]
    rows += [pruned(sparsity=0.5, update="block", used_update="block", accuracy=0.7)]
    rows += [pruned(sparsity=0.6, update="block", used_update="none", accuracy=0.6)]
    assert told(ONE, rows) == {
        ("deit", "pruned", "update block against update none, wanda per layer"): {"50%": "+10.00"}
    }


def test_a_difference_within_the_spread_of_the_seeds_is_not_told():
    rows = [pruned("magnitude", s, accuracy=0.6, calibration_seed="", training_seed="") for s in (0.5, 0.6)]
    rows += seeds((0.59, 0.61, 0.63), score="wanda", sparsity=0.5)
    rows += seeds((0.69, 0.71, 0.73), score="wanda", sparsity=0.6)
    rows += [*seeds((0.7,), score="wanda", sparsity=0.7), pruned("magnitude", 0.7, accuracy=0.5)]
    assert told(ONE, rows) == {
        ("deit", "pruned", "wanda against magnitude, per layer"): {
            "50%": "within 2.00",
            "60%": "+11.00 ± 2.00",
            "70%": "+20.00 (one run)",
        }
    }
    found = differences(ONE, rows)
    assert found.title == "Differences"
    assert "single" not in found.note.lower()
    page = render_study(ONE, rows)
    assert "within 2.00" in page
    assert "+1.00" not in page  # what the means differ by


def test_two_spreads_add_up():
    rows = seeds((0.50, 0.52), "training_seed", stage="finetuned", epochs=1, score="magnitude")
    rows += seeds((0.52, 0.54), "training_seed", stage="finetuned", epochs=1, score="wanda")
    (cells,) = told(ONE, rows).values()
    assert cells == {"50%": "within 2.83"}


def test_a_table_of_seeds_shows_mean_deviation_and_count_and_marks_what_is_within_the_spread_of_the_best():
    rows = [row("deit", accuracy=0.8), pruned("magnitude", accuracy=0.58), pruned("ria", accuracy=0.605)]
    rows += seeds((0.59, 0.61, 0.63), score="wanda")
    (table,) = results_table(ONE, rows)
    cells = table.rows[0][1]
    assert [tuple(map(plain, cell.told("accuracy"))) for cell in cells] == [
        ("58.00%", "-22.00"),
        ("60.50%", "-19.50"),
        ("61.00% ± 2.00", "-19.00, 3 seeds"),
    ]
    assert [cell.best for cell in cells] == [False, True, True]
    once = [line for line in rows if line.get("calibration_seed", "0") == "0"]
    assert [cell.best for cell in results_table(ONE, once)[0].rows[0][1]] == [False, True, False]
    assert "±" not in render_study(ONE, once)


def test_a_seed_that_failed_is_left_out_of_the_mean_and_listed():
    rows = [*seeds((0.6, 0.62)), pruned(accuracy=None, error="out of memory", calibration_seed="2")]
    (table,) = results_table(ONE, rows)
    assert table.rows[0][1][0].told("accuracy") == ("61.00% ± 1.41", "2 seeds")
    assert "out of memory" in render_study(ONE, rows)
