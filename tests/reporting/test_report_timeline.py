from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import pytest
from html_page import Page
from rich.console import Console

from sparsefit.reporting import render_html, summary
from sparsefit.reporting.run_figures import timeline

pytestmark = pytest.mark.figures

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def rows(html, heading):
    return Page(html).rows[heading]


def printed(report):
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(report))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_figure_names_the_stages_with_their_values(reconstructed):
    found = texts(timeline(reconstructed))
    stages = {"dense 18.25", "pruned 26.75", "reconstructed 22.50", "recovered 20.50", "merged 20.50"}
    assert stages <= set(found)
    assert {"validation data", "budget 0.0500", "perplexity over the run (lower is better)"} <= set(found)


def test_a_budget_that_is_far_away_is_not_drawn(reconstructed):
    reconstructed["gpu_hours"]["budget"] = 5.0
    assert not any(text.startswith("budget") for text in texts(timeline(reconstructed)))


@pytest.mark.parametrize(("pruned", "log"), [(26.75, False), (8123.4, True)])
def test_values_that_lie_far_apart_get_a_log_scale(reconstructed, pruned, log):
    moment = next(moment for moment in reconstructed["timeline"] if moment["stage"] == "pruned")
    moment["value"] = pruned
    assert any("log scale" in text for text in texts(timeline(reconstructed))) == log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "shown"),
    [
        ([("dense", 0.001, 5.0)], {"dense 5.00"}),
        ([("pruned", 0.0, 7.0)], {"pruned 7.00"}),
        ([("validation", 1.5, 7.0), ("validation", 2.5, 7.0)], {"validation data", "GPU-hours spent, all stages"}),
        ([("odd stage", 0.01, -3.0), ("dense", 0.001, 0.0)], {"odd stage -3.00"}),
    ],
)
def test_any_part_of_a_timeline_can_be_drawn(entries, shown):
    moments = [
        {"stage": stage, "gpu_hours": hours, "step": None, "metric": "perplexity", "value": value}
        for stage, hours, value in entries
    ]
    report = {"metrics": {"perplexity": "lower"}, "timeline": moments}
    assert shown <= set(texts(timeline(report)))
    measured = any(stage != "validation" for stage, _, _ in entries)
    assert ("Quality against GPU-hours" in Page(render_html(report)).headings) == measured
    assert printed(report)


def test_each_metric_has_its_own_axes(reconstructed):
    reconstructed["metrics"]["accuracy"] = "higher"
    reconstructed["timeline"] += [
        {"stage": stage, "gpu_hours": hours, "step": 0, "metric": "accuracy", "value": value}
        for stage, hours, value in (("dense", 0.002, 0.8), ("pruned", 0.005, 0.6))
    ]
    found = texts(timeline(reconstructed))
    assert {"accuracy over the run (higher is better)", "dense 80.00%", "pruned 60.00%", "dense 18.25"} <= set(found)


def test_the_table_has_all_stages(reconstructed):
    assert rows(render_html(reconstructed), "Quality against GPU-hours") == [
        ["after", "GPU-hours", "step", "perplexity", "nats lost"],
        ["dense", "0.00200", "0", "18.25", "+0.000"],
        ["pruned", "0.00550", "0", "26.75", "+0.382"],  # ln 26.75 - ln 18.25
        ["reconstructed", "0.00750", "0", "22.50", "+0.209"],
        ["recovered", "0.0398", "200", "20.50", "+0.116"],
        ["merged", "0.0415", "200", "20.50", "+0.116"],
    ]


def test_only_a_perplexity_has_nats(reconstructed):
    reconstructed["metrics"] = {"accuracy": "higher"}
    for moment in reconstructed["timeline"]:
        moment |= {"metric": "accuracy", "value": moment["value"] / 100}
    header, *body = rows(render_html(reconstructed), "Quality against GPU-hours")
    assert header == ["after", "GPU-hours", "step", "accuracy"]
    assert body[0] == ["dense", "0.00200", "0", "18.25%"]


def test_blocks_show_their_error_before_and_after(reconstructed):
    found = rows(render_html(reconstructed), "Reconstruction")
    assert ["model.layers.1", "6.000%", "3.000%", "50.0%", "48", "2.0 s"] in found
    assert ["mean", "9.000%", "4.500%", "50.0%", "", ""] in found
    assert ["passes", "3"] in found
    assert ["time", "12.0 s"] in found


def test_many_blocks_are_folded_up(reconstructed):
    assert "All 24 blocks" not in Page(render_html(reconstructed)).summaries
    reconstructed["reconstruction"]["blocks"] *= 4
    assert "All 24 blocks" in Page(render_html(reconstructed)).summaries


@pytest.mark.parametrize(
    ("merge", "said", "line"),
    [
        (
            {"lossless": True, "folder": "model", "sparsity": 0.5},
            ["lossless", "yes"],
            "merged model: masked_lora, without loss, sparsity 50.00%, in model",
        ),
        (
            {"lossless": False, "reason": "it rounds"},
            ["lossless", "no"],
            "not merged: masked_lora, kept apart: it rounds",
        ),
    ],
)
def test_the_merged_model_is_described(reconstructed, merge, said, line):
    reconstructed["merge"] = {"form": "masked_lora"} | merge
    found = rows(render_html(reconstructed), "Merged model")
    assert ["form", "masked_lora"] in found
    assert said in found
    assert (["sparsity", "50.00%"] in found) == ("sparsity" in merge)
    assert (["reason", "it rounds"] in found) == ("reason" in merge)
    assert line in printed(reconstructed)


def test_the_terminal_shows_quality_against_hours(reconstructed):
    lines = printed(reconstructed)
    for line in (
        "perplexity 18.25 26.75 22.50 20.50 20.50 69.6%",
        "after GPU-hours step perplexity nats lost",
        "recovered 0.0398 200 20.50 +0.116",
        "reconstruction: 6 blocks, mean error of their outputs 9.000% -> 4.500%",
    ):
        assert line in lines
    assert not any(line.startswith("validation") for line in lines)


def test_a_report_without_these_parts_does_not_mention_them(report):
    html, lines = render_html(report), printed(report)
    for part in ("over the run", "Quality against", "Reconstruction", "Merged model"):
        assert part not in html
    assert not any(line.startswith(("after", "reconstruction", "merged")) for line in lines)
