from __future__ import annotations

import copy
import io
import math
import re

import pytest
from html_page import Page
from rich.console import Console
from study_rows import plain, pruned, row, text_rows, text_study, vision_rows, vision_study

from sparsefit.reporting.console import study_summary
from sparsefit.reporting.pages import render_study

pytestmark = pytest.mark.figures

ONE = vision_study(("deit",))


def cells(html, heading):
    return [[plain(cell) for cell in row] for row in Page(html).rows[heading]]


def printed(study, rows, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(study_summary(study, rows))
    return [plain(" ".join(line.split())) for line in console.file.getvalue().splitlines()]


@pytest.fixture(scope="module")
def whole():
    rows = list(vision_rows(scores=("magnitude", "wanda"), sparsities=(0.5, 0.8)))
    return render_study(vision_study(), rows)


@pytest.mark.slow
def test_the_page_is_self_contained_and_well_formed(whole):
    page = Page(whole)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
        elif not name.startswith("xmlns"):
            assert "://" not in value
    assert re.findall(r"url\((?!#)|@import", whole) == []
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50


def test_the_page_says_what_was_run_and_what_it_took(whole):
    text = Page(whole).text
    for shown in (
        "20 of 20 points",
        "convnext-tiny, deit-small",
        "magnitude, wanda",
        "per output, per layer",
        "50%, 80%, 2:4",
    ):
        assert shown in text
    for shown in (
        "sparsefit study --config",
        "runs/vision-study",
        "25,509,888",
        "4,096",
        "training images",
    ):
        assert shown in text
    for shown in ("15 min 03 s", "2 weights left dense", "the patch embedding", "Configuration", "8.00 GiB"):
        assert shown in text
    assert "Also measured: top5 accuracy" in text
    assert "None" not in text
    assert "Failed" not in text


def test_the_table_has_a_column_for_each_way(whole):
    ways = [f"{score} per {of}" for score in ("magnitude", "wanda") for of in ("output", "layer")]
    rows = cells(whole, "Results")
    assert rows[0] == ["sparsity", *ways]
    assert [row[0] for row in rows[:5]] == ["sparsity", "50%", "80%", "sparsity", "2:4"]
    assert ["sparsity", "magnitude per layer", "wanda per layer"] in rows  # what was fine-tuned
    text = Page(whole).text
    for title in ("pruned", "after 2 epochs"):
        assert f"deit-small: accuracy, {title}, dense 79.82%" in text


def test_failed_points_are_listed_with_their_error():
    rows = [row("deit", accuracy=0.8), pruned(accuracy=0.7)]
    rows += [pruned(sparsity=s, accuracy=None, error="ConfigError: <b>5 & 6</b>") for s in (0.6, 0.7)]
    html = render_study(ONE, rows)
    assert "<b>5" not in html
    page = Page(html)
    assert page.text.count("ConfigError: <b>5 & 6</b>") == 1
    assert "Failed: 2" in page.headings
    assert "deit: wanda per layer, 60%, pruned\n" in page.text
    assert "deit: wanda per layer, 70%, pruned\n" in page.text
    assert page.badge == "1 of 3 points, 2 failed"
    assert [line[0:2] for line in cells(html, "Results")][2:] == [["60%", "failed"], ["70%", "failed"]]
    assert printed(ONE, rows)[0] == f"{ONE['name']}: 1 of 3 points, 2 failed"


EDGES = {
    "nothing": ({}, []),
    "no rows": (ONE, []),
    "dense alone": (ONE, [row("deit", accuracy=0.8)]),
    "dense failed": (ONE, [row("deit", accuracy=None, error="no data")]),
    "one point": (ONE, [pruned(accuracy=0.7)]),
    "no dense": (ONE, [pruned(accuracy=0.7), pruned("magnitude", accuracy=0.6)]),
    "all failed": (ONE, [pruned(s, accuracy=None, error="x") for s in ("wanda", "magnitude")]),
    "tuned alone": (ONE, [pruned(stage="finetuned", accuracy=0.7, epochs=None)]),
    "patterns alone": (ONE, [pruned(pattern="2:4", granularity="", accuracy=0.7)]),
    "no value": (ONE, [pruned(accuracy=math.nan), pruned("magnitude", accuracy=math.inf)]),
    "infinite": (
        ONE | {"metrics": {"perplexity": "lower"}},
        [row("deit", perplexity=math.inf), pruned(perplexity=math.inf)],
    ),
    "undeclared": ({}, [pruned(accuracy=0.7)]),
    "bare": (
        {"metrics": {"accuracy": "higher"}},
        [{"model": "deit", "score": "wanda", "sparsity": 0.5, "accuracy": 0.5}],
    ),
    "other metric": (
        {"metrics": {"f1": "higher"}},
        [row("deit", f1=0.0), pruned(f1=-3.0), pruned(sparsity=0.6, f1=5.0)],
    ),
}


@pytest.mark.parametrize(("study", "rows"), EDGES.values(), ids=EDGES)
def test_any_study_can_be_shown(study, rows):
    page = Page(render_study(study, rows))
    assert study.get("name", "study") in page.text
    for word in ("None", "nan"):
        assert not re.search(rf"\b{word}\b", page.text)
        assert not any(re.search(rf"\b{word}\b", line) for line in printed(study, rows))


def test_a_study_that_was_stopped_shows_what_there_is():
    rows = list(vision_rows(("deit",), ("magnitude", "wanda"), ("layer",), (0.5, 0.6), epochs=0))[:4]
    found = cells(render_study(ONE, rows), "Results")
    assert [line[0] for line in found] == ["sparsity", "50%", "60%"]
    assert found[2][2] == "—"


def started(status="", failure="", planned=12, rows=()):
    """A study of two models, stopped in the first one: 5 rows, of 2 points and the dense model."""
    measured = [row("deit", accuracy=0.8), *rows]
    measured += [pruned(sparsity=s, accuracy=0.7) for s in (0.5, 0.6)]
    measured += [pruned(stage="finetuned", sparsity=s, accuracy=0.7, epochs=2) for s in (0.5, 0.6)]
    known = {"planned": planned, "status": status, "failure": failure}
    return vision_study() | {key: value for key, value in known.items() if value}, measured


FAILED_ROW = pruned(sparsity=0.7, accuracy=None, error="x")


@pytest.mark.parametrize(
    ("stopped", "reported", "kind", "notice"),
    [
        (started("interrupted"), "5 of 12 rows measured, interrupted", "interrupted", "The study was interrupted"),
        (
            started("failed", "a <b> & c"),
            "5 of 12 rows measured, ended by an error",
            "failed",
            "ed with an error: a <b>",
        ),
        (started("running"), "5 of 12 rows measured, not finished", "interrupted", ""),
        (started(), "5 of 12 rows measured", "interrupted", ""),
        (
            started("interrupted", rows=[FAILED_ROW]),
            "5 of 12 rows measured, 1 failed, interrupted",
            "interrupted",
            "continues where it stopped",
        ),
        # Rows of an earlier grid make up for those that are missing.
        (started("interrupted", planned=5), "2 points measured, interrupted", "interrupted", "was interrupted"),
    ],
)
def test_a_study_that_was_stopped_says_how_far_it_got(stopped, reported, kind, notice):
    page = Page(render_study(*stopped))
    assert (page.badge, page.kind) == (reported, kind)
    assert bool(page.notices) == bool(notice)
    assert all(notice in shown for shown in page.notices)
    lines = printed(*stopped)
    assert lines[0] == f"{stopped[0]['name']}: {reported}"
    assert notice in lines[1]


@pytest.mark.parametrize(
    ("study", "badge", "kind"),
    [
        (started("finished", planned=5), "2 of 2 points", "finished"),
        (started(planned=None), "2 of 2 points", "finished"),
        # A point that could not be pruned has no row of its fine-tuning.
        (started("finished", planned=7, rows=[FAILED_ROW]), "2 of 3 points, 1 failed", "interrupted"),
    ],
)
def test_a_study_that_went_to_its_end_counts_its_points(study, badge, kind):
    page = Page(render_study(*study))
    assert (page.badge, page.kind, page.notices) == (badge, kind, [])
    assert printed(*study)[0] == f"{study[0]['name']}: {badge}"


def test_the_end_of_a_study_is_reported_where_its_error_or_its_size_is_not_known():
    assert printed(*started("failed"))[0].endswith(": 5 of 12 rows measured, ended by an error")
    assert printed(*started("interrupted", planned=None))[0].endswith(": 2 points measured, interrupted")
    assert printed(*started("finished", planned=4))[0].endswith(": 2 of 2 points")


def test_a_study_that_ended_before_its_first_point_says_why():
    study = ONE | {"planned": 5, "status": "failed", "failure": "no test data"}
    page = Page(render_study(study, [row("deit", accuracy=0.8)]))
    assert (page.kind, page.badge) == ("failed", "1 of 5 rows measured, ended by an error")
    (notice,) = page.notices
    assert notice == "No point of this study has been measured. The study ended with an error: no test data"


@pytest.mark.parametrize("prunable", [{}, {"prunable": None}])
def test_a_model_that_was_not_pruned_has_no_count_of_prunable_weights(prunable):
    study = ONE | {"models": {"deit": {"parameters": 1000} | prunable}}
    rows = cells(render_study(study, [row("deit", accuracy=0.8)]), "Models")
    assert [found for found in rows if found[0] == "prunable weights"] == [["prunable weights", "—"]] * len(prunable)
    assert ["parameters", "1,000"] in rows
    assert ["accuracy", "80.00%"] in rows


def test_points_that_were_pruned_in_another_order_stand_apart():
    rows = [pruned(update="none", used_update="none", accuracy=0.7)]
    rows += [pruned(update="block", used_update="none", accuracy=0.65)]
    rows += [pruned(sparsity=0.6, update="block", used_update="block", accuracy=0.6)]
    rows += [pruned(sparsity=0.7, update="block", used_update="", accuracy=0.55)]
    heads, *values = cells(render_study(ONE, rows), "Results")
    fell_back = "wanda per layer, update block, pruned in the order none"
    assert heads == ["sparsity", "wanda per layer", fell_back, "wanda per layer, update block"]
    assert values == [
        ["50%", "70.00%", "65.00%", "—"],
        ["60%", "—", "—", "60.00%"],
        ["70%", "—", "—", "55.00%"],
    ]
    assert any("pruned in" in line for line in printed(ONE, rows))
    as_asked = [line | {"used_update": line["update"]} for line in rows]
    assert cells(render_study(ONE, as_asked), "Results")[0] == [
        "sparsity",
        "wanda per layer",
        "wanda per layer, update block",
    ]
    assert not any("pruned in" in line for line in printed(ONE, as_asked))


def test_a_third_metric_is_folded_up():
    study = ONE | {"metrics": {"accuracy": "higher", "top5_accuracy": "higher", "loss": "lower"}}
    html = render_study(study, [pruned(accuracy=0.7, top5_accuracy=0.9, loss=1.25)])
    page = Page(html)
    assert [reported for reported in page.summaries if "Also" in reported] == [
        "Also measured: top5 accuracy",
        "Also measured: loss",
    ]
    assert "1.25" in page.text


def hostile(value, evil='<script>alert("1")</script>&'):
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + evil if isinstance(value, str) else value


def test_every_text_is_escaped():
    study = hostile({key: value for key, value in ONE.items() if key not in ("metrics", "models")})
    study |= {"metrics": ONE["metrics"], "models": {"deit<script>": hostile(copy.deepcopy(ONE["models"]["deit"]))}}
    names = ("model", "score", "granularity", "update", "pattern", "error")
    rows = [
        pruned(accuracy=0.7, error="broken", pattern="2:4"),
        pruned(accuracy=0.6),
        pruned(accuracy=0.5, update="block"),
    ]
    rows = [line | {key: line[key] + "<script>" for key in names} for line in rows]
    html = render_study(study, rows)
    page = Page(html)
    assert "<script" not in html
    for shown in (
        "wanda<script>",
        "deit<script>",
        "broken<script>",
        "block<script>",
        "the head<script>",
        "Some CPU @ 3 GHz<s",
    ):
        assert shown in page.text


def test_names_of_metrics_and_models_are_no_template_code():
    metric, model = "<b>score</b> {{ 7 * 7 }}", "{% include 'x' %}"
    study = {"metrics": {"accuracy": "higher", metric: "higher"}, "models": {model: {"class": metric}}}
    rows = [row(model, accuracy=0.8, **{metric: 0.9}), pruned(model=model, accuracy=0.7, **{metric: 0.5})]
    html = render_study(study, rows)
    assert "<b>score" not in html
    page = Page(html)
    assert f"Also measured: {metric}" in page.summaries
    assert ["class", metric] in page.rows["Models"]
    assert any(model in line for line in page.text.splitlines())


def test_the_terminal_shows_tables_and_differences():
    lines = printed(text_study(), text_rows())
    assert "tiny-llama: perplexity, pruned, dense 12.40" in lines
    assert any(line.startswith("70% 4,990.5 x402") for line in lines)
    assert any(line.startswith("80% inf") for line in lines)
    assert "Single-run differences" in lines
    assert any(
        line.startswith("update block against update none") and line.endswith("one run not known") for line in lines
    )
    assert "time: 3 min 29 s" in lines
    assert "study folder: runs/vision-study" in lines


def test_names_are_not_read_as_terminal_markup():
    rows = [pruned("[red]score[/red]", model="[bold]m", accuracy=0.7)]
    lines = printed(ONE | {"models": {}, "name": "[blue]n"}, rows)
    assert lines[0].startswith("[blue]n")
    assert any("[red]score[/red]" in line for line in lines)
    assert any("[bold]m: accuracy" in line for line in lines)
