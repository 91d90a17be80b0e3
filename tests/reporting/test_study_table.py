from __future__ import annotations

import math

import pytest
from html_page import Page
from study_rows import plain, pruned, row, vision_study

from sparsefit.reporting import study_tables
from sparsefit.reporting.pages import render_study
from sparsefit.reporting.study_results import per, read_results
from sparsefit.reporting.study_tables import change

ONE = vision_study(("deit",))


def results_tables(study, rows):
    return study_tables.results_tables(read_results(study, rows))


def differences(study, rows):
    return study_tables.differences(read_results(study, rows))


def reported(study, rows):
    """The claims of a study: what is compared, at which amount, difference, spread, whether it is beyond that."""
    return {(claim[0], claim[1]): tuple(map(plain, claim[2:])) for claim in differences(study, rows).rows}


def seeds(values, name="calibration_seed", **known):
    """A run of a point for each value, with seeds 0, 1, ..."""
    return [pruned(**known, accuracy=value, **{name: str(seed)}) for seed, value in enumerate(values)]


def best(table):
    return [cell.kind == "best" for cell in table.rows[0][1:]]


def test_the_best_of_a_row_and_stage_is_marked():
    rows = [row("deit", accuracy=0.8)]
    values = {"magnitude": (0.5, 0.7), "wanda": (0.6, 0.7), "ria": (0.55, 0.6)}
    for score, (before, after) in values.items():
        rows += [pruned(score, accuracy=before), pruned(score, stage="finetuned", epochs=1, accuracy=after)]
    before, after = results_tables(ONE, rows)
    assert (best(before), best(after)) == ([False, True, False], [True, True, False])
    assert [plain(cell.small) for cell in before.rows[0][1:]] == ["-30.00", "-20.00", "-25.00"]
    assert before.title == "deit: accuracy, pruned, dense 80.00%"
    assert after.title == "deit: accuracy, after 1 epoch, dense 80.00%"
    assert best(results_tables(ONE | {"metrics": {"accuracy": "lower"}}, rows)[0]) == [True, False, False]


def test_patterns_stand_among_the_sparsities_where_each_score_has_one_granularity():
    rows = [pruned(sparsity=0.4, accuracy=0.7), pruned(accuracy=0.6), pruned(sparsity=0.6, accuracy=0.5)]
    rows.append(pruned(granularity="", pattern="2:4", accuracy=0.55))
    (table,) = results_tables(ONE, rows)
    assert [(amount, cell.text) for amount, cell in table.rows] == [
        ("40%", "70.00%"),
        ("50%", "60.00%"),
        ("2:4", "55.00%"),
        ("60%", "50.00%"),
    ]
    free, patterns = results_tables(ONE, [*rows, pruned(granularity="output", accuracy=0.3)])
    assert [amount for amount, *_ in free.rows] == ["40%", "50%", "60%"]
    assert [(amount, cell.text) for amount, cell in patterns.rows] == [("2:4", "55.00%")]


@pytest.mark.parametrize(
    ("metric", "value", "dense", "reported"),
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
def test_a_change_is_reported_in_the_units_of_its_metric(metric, value, dense, reported):
    assert plain(change(metric, value, dense)) == reported


@pytest.mark.parametrize(
    ("granularity", "reported"),
    [
        ("layer", "per layer"),
        ("(input, 4)", "per 4 inputs"),
        ("output:128", "per 128 outputs"),
        ("variant", "variant"),
        ("", ""),
    ],
)
def test_granularities_read_as_words(granularity, reported):
    assert per(granularity) == reported


def test_of_rows_of_one_point_the_last_counts():
    rows = [pruned(accuracy=None, error="out of memory"), pruned(accuracy=0.7)]
    assert results_tables(ONE, rows)[0].rows[0][1].text == "70.00%"
    assert "out of memory" not in render_study(ONE, rows)


def test_scores_granularities_and_orders_are_compared_with_the_first_of_each():
    rows = [row("deit", accuracy=0.8)]
    for sparsity, magnitude, output, layer in ((0.5, 0.7, 0.75, 0.78), (0.6, 0.75, 0.76, 0.75)):
        rows.append(pruned("magnitude", sparsity, accuracy=magnitude))
        rows.append(pruned("wanda", sparsity, granularity="output", accuracy=output))
        rows.append(pruned("wanda", sparsity, accuracy=layer))
    rows += [pruned(s, granularity="", pattern="2:4", accuracy=v) for s, v in (("magnitude", 0.6), ("wanda", 0.62))]
    scores, granularities = "wanda against magnitude, per layer", "per layer against per output, wanda"
    assert reported(ONE, rows) == {
        (scores, "50%"): ("+8.00", "one run", "not known"),
        (scores, "2:4"): ("+2.00", "one run", "not known"),
        (scores, "60%"): ("+0.00", "one run", "not known"),
        (granularities, "50%"): ("+3.00", "one run", "not known"),
        (granularities, "60%"): ("-1.00", "one run", "not known"),
    }
    found = differences(ONE, rows)
    assert found.title == "Single-run differences"
    assert [row[1] for row in found.rows] == ["50%", "2:4", "60%", "50%", "60%"]
    assert any("no spread" in note for note in found.notes)


def test_a_perplexity_is_compared_in_per_cent_and_an_infinite_one_is_not():
    study = ONE | {"metrics": {"perplexity": "lower"}}
    rows = [pruned("magnitude", 0.5, perplexity=20.0), pruned("magnitude", 0.6, perplexity=math.inf)]
    rows += [pruned("wanda", s, granularity="output", perplexity=10.0) for s in (0.5, 0.6)]
    claim = ("wanda per output against magnitude per layer", "50%")
    assert reported(study, rows) == {claim: ("-50.0%", "one run", "not known")}


def test_models_of_different_metrics_are_compared_apart():
    study = {"metrics": {"accuracy": "higher", "perplexity": "lower"}}
    rows = [pruned(s, model="net", accuracy=v) for s, v in (("magnitude", 0.4), ("wanda", 0.5))]
    rows += [pruned(s, model="text", perplexity=v) for s, v in (("magnitude", 20.0), ("wanda", 40.0))]
    compared = "wanda against magnitude, per layer"
    assert reported(study, rows) == {
        (f"net: {compared}", "50%"): ("+10.00", "one run", "not known"),
        (f"text: {compared}", "50%"): ("+100.0%", "one run", "not known"),
    }
    assert [table.title for table in results_tables(study, rows)] == [
        "net: accuracy, pruned",
        "text: perplexity, pruned",
    ]
    assert "Also measured" not in render_study(study, rows)


def test_orders_are_compared_where_they_were_really_used():
    rows = [pruned(sparsity=s, update="none", used_update="none", accuracy=0.6) for s in (0.5, 0.6)]
    rows += [pruned(sparsity=0.5, update="block", used_update="block", accuracy=0.7)]
    rows += [pruned(sparsity=0.6, update="block", used_update="none", accuracy=0.6)]
    claim = ("update block against update none, wanda per layer", "50%")
    assert reported(ONE, rows) == {claim: ("+10.00", "one run", "not known")}


def test_a_difference_within_the_spread_of_the_seeds_is_not_reported():
    rows = [pruned("magnitude", s, accuracy=0.6, calibration_seed="", training_seed="") for s in (0.5, 0.6)]
    rows += seeds((0.59, 0.61, 0.63), score="wanda", sparsity=0.5)
    rows += seeds((0.69, 0.71, 0.73), score="wanda", sparsity=0.6)
    rows += [*seeds((0.7,), score="wanda", sparsity=0.7), pruned("magnitude", 0.7, accuracy=0.5)]
    compared = "wanda against magnitude, per layer"
    assert reported(ONE, rows) == {
        (compared, "50%"): ("—", "2.00", "no"),
        (compared, "60%"): ("+11.00", "2.00", "yes"),
        (compared, "70%"): ("+20.00", "one run", "not known"),
    }
    found = differences(ONE, rows)
    assert found.title == "Differences"
    assert not any("single" in note.lower() for note in found.notes)
    html = render_study(ONE, rows)
    assert [compared, "50%", "—", "2.00", "no"] in Page(html).rows["Differences"]
    assert "+1.00" not in html  # what the means differ by


def test_two_spreads_add_up():
    rows = seeds((0.50, 0.52), "training_seed", stage="finetuned", epochs=1, score="magnitude")
    rows += seeds((0.52, 0.54), "training_seed", stage="finetuned", epochs=1, score="wanda")
    assert list(reported(ONE, rows).values()) == [("—", "2.83", "no")]


def test_a_claim_names_model_and_stage_where_there_are_several():
    study, rows = vision_study(), []
    for model in ("convnext-tiny", "deit-small"):
        for stage in ("pruned", "finetuned"):
            rows += [pruned(s, model=model, stage=stage, epochs=1, accuracy=0.5) for s in ("magnitude", "wanda")]
    assert [claim for claim, _ in reported(study, rows)] == [
        f"{model}, {stage}: wanda against magnitude, per layer"
        for model in ("convnext-tiny", "deit-small")
        for stage in ("pruned", "after 1 epoch")
    ]


def test_a_table_of_seeds_shows_mean_deviation_and_count_and_marks_what_is_within_the_spread_of_the_best():
    rows = [row("deit", accuracy=0.8), pruned("magnitude", accuracy=0.58), pruned("ria", accuracy=0.605)]
    rows += seeds((0.59, 0.61, 0.63), score="wanda")
    (table,) = results_tables(ONE, rows)
    assert [(cell.text, plain(cell.small)) for cell in table.rows[0][1:]] == [
        ("58.00%", "-22.00"),
        ("60.50%", "-19.50"),
        ("61.00% ± 2.00", "-19.00, 3 seeds"),
    ]
    assert best(table) == [False, True, True]
    once = [line for line in rows if line.get("calibration_seed", "0") == "0"]
    assert best(results_tables(ONE, once)[0]) == [False, True, False]
    assert "±" not in render_study(ONE, once)


def test_a_seed_that_failed_is_left_out_of_the_mean_and_listed():
    rows = [*seeds((0.6, 0.62)), pruned(accuracy=None, error="out of memory", calibration_seed="2")]
    (table,) = results_tables(ONE, rows)
    assert table.rows[0][1][:2] == ("61.00% ± 1.41", "2 seeds")
    assert "out of memory" in render_study(ONE, rows)
