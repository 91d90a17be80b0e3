from __future__ import annotations

import math

import pytest
from study_rows import plain, pruned, row, vision_study

from sparsefit.reporting.study_findings import findings
from sparsefit.reporting.study_page import render_study
from sparsefit.reporting.study_table import change, per, results_table

ONE = vision_study(("deit",))


def said(study, rows):
    return {topic: list(map(plain, told)) for topic, told in findings(study, rows)}


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


def test_findings_count_and_average():
    rows = [row("deit", accuracy=0.8)]
    wanda, output, magnitude = (0.78, 0.75, 0.60), (0.77, 0.76, 0.55), (0.70, 0.75, 0.40)
    for sparsity, *values in zip((0.5, 0.6, 0.7), wanda, output, magnitude, strict=True):
        ways = (("wanda", "layer"), ("wanda", "output"), ("magnitude", "layer"))
        for (score, granularity), value in zip(ways, values, strict=True):
            rows.append(pruned(score, sparsity, granularity=granularity, accuracy=value, counted=sparsity - 0.002))
    rows.append(pruned("wanda", 0.7, stage="finetuned", epochs=2, accuracy=0.75))
    rows.append(pruned("wanda", 0.5, granularity="", pattern="2:4", accuracy=0.74, counted=0.5))
    told = said(ONE, rows)
    assert told["Scores"] == ["Wanda beats magnitude at 2 of 3 sparsities, 1 tied, per layer (mean +9.33 points)"]
    assert told["Granularities"] == ["Per layer beats per output at 2 of 3 sparsities with wanda (mean +1.67 points)"]
    assert told["N:M patterns"] == ["2:4 against 50% without a pattern: wanda per layer -4.00 points"]
    assert told["Fine-tuning"] == [
        "At 70% (wanda per layer), -20.00 points from the dense model right after pruning, "
        "-5.00 points after 2 epochs, 25% of the loss is left"
    ]
    assert told["Sparsity at little cost"] == [
        "Within 1 point of the dense accuracy: none of those tried, nearest 50% (wanda per layer: -2.00 points); "
        "after 2 epochs, none of those tried, nearest 70% (wanda per layer: -5.00 points)"
    ]
    assert told["Counted"][0].startswith(
        "The zeros counted in 11 measured models are within 0.2 points of the sparsity"
    )


def test_findings_take_perplexities_as_ratios_and_an_infinite_one_as_lost():
    study = ONE | {"metrics": {"perplexity": "lower"}}
    rows = [row("deit", perplexity=10.0)]
    for sparsity, better, worse in ((0.5, 10.5, 21.0), (0.6, 12.0, math.inf)):
        rows += [pruned("wanda", sparsity, perplexity=better), pruned("magnitude", sparsity, perplexity=worse)]
    told = said(study, rows)
    assert told["Scores"] == ["Wanda beats magnitude at 2 of 2 sparsities per layer (mean -50.0% perplexity)"]
    assert told["Sparsity at little cost"] == [
        "Within 10% of the dense perplexity: 50% (wanda per layer: +5.0% perplexity)"
    ]


def test_findings_over_models_name_those_that_differ():
    rows = []
    for model, values in {"a": (0.5, 0.4), "b": (0.5, 0.6)}.items():
        rows += [pruned(s, model=model, accuracy=v) for s, v in zip(("wanda", "magnitude"), values, strict=True)]
    even = said({"metrics": {"accuracy": "higher"}}, rows)["Scores"]
    assert even == [
        "Wanda and magnitude each win at 1 of 2 settings of 2 models per layer (mean +0.00 points; a 1 of 1, b 0 of 1)"
    ]
    rows[-1]["accuracy"] = 0.5
    tied = said({"metrics": {"accuracy": "higher"}}, rows)["Scores"]
    assert tied == [
        "Wanda beats magnitude at 1 of 2 settings of 2 models, 1 tied, per layer "
        "(mean +5.00 points; a 1 of 1, b 0 of 1)"
    ]


def test_models_of_different_metrics_are_compared_apart():
    study = {"metrics": {"accuracy": "higher", "perplexity": "lower"}}
    rows = [pruned(s, model="net", accuracy=v) for s, v in (("wanda", 0.5), ("magnitude", 0.4))]
    rows += [pruned(s, model="text", perplexity=v) for s, v in (("wanda", 40.0), ("magnitude", 20.0))]
    assert said(study, rows)["Scores"] == [
        "Wanda beats magnitude at 50% per layer (+10.00 points)",
        "Magnitude beats wanda at 50% per layer (-50.0% perplexity)",
    ]
    assert [(table.model, table.metric) for table in results_table(study, rows)] == [
        ("net", "accuracy"),
        ("text", "perplexity"),
    ]
    assert "Also measured" not in render_study(study, rows)


def test_of_rows_of_one_point_the_last_counts():
    rows = [pruned(accuracy=None, error="out of memory"), pruned(accuracy=0.7)]
    assert results_table(ONE, rows)[0].rows[0][1][0].value == 0.7
    assert "out of memory" not in render_study(ONE, rows)


def test_a_pattern_is_compared_with_points_of_its_own_order():
    rows = []
    for update, free, pattern in (("none", 0.7, 0.6), ("block", 0.75, 0.73)):
        rows.append(pruned(update=update, accuracy=free))
        rows.append(pruned(granularity="", pattern="2:4", update=update, accuracy=pattern))
    against = "2:4 against 50% without a pattern: wanda per layer, update "
    told = said(ONE, rows)["N:M patterns"]
    assert told[-1] == f"{against}none -10.00 points; wanda per layer, update block -2.00 points"
    # The other order of the pattern has nothing to be compared with.
    assert said(ONE, [rows[0], *rows[1::2]])["N:M patterns"][-1] == f"{against}none -10.00 points"


def test_the_mean_of_a_pattern_counts_the_models_that_it_is_taken_over():
    study = {"metrics": {"perplexity": "lower"}}
    rows = [pruned(model=model, perplexity=10.0) for model in "abc"]
    values = {"a": 20.0, "b": 9.8, "c": math.inf}
    rows += [pruned(model=m, granularity="", pattern="2:4", perplexity=value) for m, value in values.items()]
    (told,) = said(study, rows)["N:M patterns"]
    assert told.endswith("wanda per layer +40.0% perplexity (mean of 2 models)")


def in_orders(used, sparsities=(0.5, 0.6)):
    rows = [pruned(sparsity=s, update="none", used_update="none", accuracy=0.6) for s in sparsities]
    return rows + [pruned(sparsity=s, update="block", used_update=used, accuracy=0.7) for s in sparsities]


def test_findings_leave_out_points_that_were_not_pruned_in_their_order():
    magnitude = [pruned("magnitude", s, accuracy=0.5) for s in (0.5, 0.6)]
    for used in ("block", ""):
        told = said(ONE, in_orders(used) + magnitude)
        assert told["Order"] == [
            "Update block beats update none at 2 of 2 sparsities with wanda per layer (mean +10.00 points)"
        ]
    told = said(ONE, in_orders("none") + magnitude)
    assert "Order" not in told
    assert told["Scores"] == ["Wanda beats magnitude at 2 of 2 sparsities per layer (mean +10.00 points)"]


def test_a_point_counts_under_its_real_order_where_that_was_not_measured_itself():
    rows = [pruned(update=update, used_update="none", accuracy=0.7) for update in ("block", "layer")]
    told = said(ONE, [*rows, pruned("magnitude", accuracy=0.5)])
    assert told["Scores"] == ["Wanda beats magnitude at 50% per layer (+20.00 points)"]
    assert "Order" not in told
