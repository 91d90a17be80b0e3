from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from sparsefit.reporting import render_html, summary
from sparsefit.reporting.timeline_figure import timeline

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def rows(html, heading):
    """The cells of the tables below a heading of the page."""
    card = html[html.index(f"<h2>{heading}</h2>") :].split("</section>")[0]
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", card)]
    return [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in found]


def printed(report):
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(report))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_figure_names_the_stages_with_their_values(reconstructed):
    found = texts(timeline(reconstructed))
    assert {"dense 18.25", "pruned 26.75", "reconstructed 22.50", "recovered, merged 20.50"} <= set(found)
    assert {"validation data", "budget", "perplexity over the run (lower is better)"} <= set(found)


def test_stages_that_lie_apart_have_labels_of_their_own(reconstructed):
    reconstructed["timeline"][-1]["value"] = 25.0
    assert {"recovered 20.50", "merged 25.00"} <= set(texts(timeline(reconstructed)))


@pytest.mark.parametrize(("pruned", "log"), [(26.75, False), (8123.4, True)])
def test_values_that_lie_far_apart_get_a_log_scale(reconstructed, pruned, log):
    moment = next(moment for moment in reconstructed["timeline"] if moment["stage"] == "pruned")
    moment["value"] = pruned
    assert any("log scale" in text for text in texts(timeline(reconstructed))) == log


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
    assert "Quality against GPU-hours" in render_html(report)
    assert printed(report)


def test_each_metric_has_its_own_axes(reconstructed):
    reconstructed["metrics"]["accuracy"] = "higher"
    reconstructed["timeline"] += [
        {"stage": stage, "gpu_hours": hours, "step": 0, "metric": "accuracy", "value": value}
        for stage, hours, value in (("dense", 0.002, 0.8), ("pruned", 0.005, 0.6))
    ]
    found = texts(timeline(reconstructed))
    assert {"accuracy over the run (higher is better)", "dense 80.00%", "pruned 60.00%", "dense 18.25"} <= set(found)


def test_the_table_has_all_stages_and_some_validations(reconstructed):
    header, *body = rows(render_html(reconstructed), "Quality against GPU-hours")
    assert header == ["stage", "GPU-hours", "step", "perplexity", "nats lost"]
    assert body[:3] == [
        ["dense", "0.00200", "0", "18.25", "+0.000"],
        ["pruned", "0.00550", "0", "26.75", "+0.382"],  # ln 26.75 - ln 18.25
        ["reconstructed", "0.00750", "0", "22.50", "+0.209"],
    ]
    assert [row[0] for row in body[3:]] == ["validation"] * 8 + ["recovered", "merged"]
    assert body[10][2] == "200"  # the last validation is among those shown
    assert {row[4] for row in body[3:11]} == {"—"}


def test_blocks_show_their_error_before_and_after(reconstructed):
    found = rows(render_html(reconstructed), "Reconstruction")
    assert ["model.layers.1", "6.000%", "3.000%", "50.0%", "48", "2.0 s"] in found
    assert ["mean", "9.000%", "4.500%", "50.0%", "", ""] in found
    assert ["passes", "3"] in found
    assert ["time", "12.0 s"] in found


def test_many_blocks_are_folded_up(reconstructed):
    assert "All 24 blocks" not in render_html(reconstructed)
    reconstructed["reconstruction"]["blocks"] *= 4
    assert "<summary>All 24 blocks</summary>" in render_html(reconstructed)


@pytest.mark.parametrize(("lossless", "said"), [(True, "yes"), (False, "no")])
def test_the_merged_model_is_described(reconstructed, lossless, said):
    reconstructed["merge"]["lossless"] = lossless
    found = rows(render_html(reconstructed), "Merged model")
    for row in (["form", "masked_lora"], ["lossless", said], ["sparsity", "50.00%"], ["perplexity", "20.50"]):
        assert row in found
    line = next(line for line in printed(reconstructed) if line.startswith("merged model:"))
    assert ("without loss" in line) == lossless
    assert "sparsity 50.00%, perplexity 20.50, in model" in line


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
