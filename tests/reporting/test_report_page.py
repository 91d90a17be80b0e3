from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
from html_page import Page

from sparsefit.reporting import render_html
from sparsefit.reporting.run_figures import loss, sparsity, timeline

pytestmark = pytest.mark.figures


@pytest.mark.slow
def test_the_page_is_self_contained_and_well_formed(any_report):
    html = render_html(any_report)
    page = Page(html)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "srcset"):
            assert value.startswith("#")
        elif not name.startswith("xmlns"):
            assert "://" not in value
        assert not name.startswith("on")
    assert "@import" not in page.text
    assert re.findall(r"url\((?!#)", html) == []


def test_ids_are_unique_and_references_resolve(report):
    html = render_html(report)
    page = Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    referred = [value[1:] for _, name, value in page.attributes if name == "xlink:href"]
    assert set(referred + re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_the_page_shows_the_key_figures(report):
    page = Page(render_html(report))
    text = page.text
    for shown in ("50.00%", "0.0415", "of 0.0500 (83.0%)", "1.50 GiB", "finished", "base/model.safetensors"):
        assert shown in text
    assert page.rows["Quality"] == [
        ["", "dense", "pruned", "recovered", "won back"],
        ["perplexity", "18.25", "26.75", "20.50", "69.6%"],
    ]
    for shown in (report["folder"], report["command"], "gpu_hours budget reached", "tied to the embedding", "2.8.0"):
        assert shown in text
    assert all(layer["name"] in text for layer in report["sparsity"]["layers"])
    assert "20.00% of the elements of all matrices of the model are zero" in text


def test_the_errors_of_layers_are_reported_as_their_mean(report):
    rows = Page(render_html(report)).rows["Pruning"]
    assert ["score", "wanda"] in rows
    assert ["tokens", "32,768"] in rows
    assert ["order used", "block"] in rows
    report["pruning"]["layer_errors"] = {"a": 0.02, "b": 0.04, "c": None}
    assert ["mean error of outputs", "3.00%"] in Page(render_html(report)).rows["Pruning"]


@pytest.mark.slow
def test_a_control_has_its_figures_and_costs_apart(report, controlled):
    page = Page(render_html(controlled))
    text = page.text
    assert page.rows["Quality"] == [
        ["", "dense", "pruned", "recovered", "control", "won back", "distance from control"],
        ["perplexity", "18.25", "26.75", "20.50", "16.00", "69.6%", "+0.248 nats"],
    ]
    for shown in ("distance from control", "0.0250", "without the teacher"):
        assert shown in text
    assert "of 0.0500 (83.0%)" in text
    assert "distance from control" not in Page(render_html(report)).text
    assert "made the dense model worse" not in text
    controlled["perplexity"]["control"] = 19.0  # above dense
    assert "made the dense model worse in perplexity" in Page(render_html(controlled)).text
    controlled["perplexity"].pop("control")
    controlled["control"] = {"status": "failed", "steps": 7, "error": "RuntimeError: no memory"}
    text = Page(render_html(controlled)).text
    assert "RuntimeError: no memory" in text
    assert "distance from control" not in text


def test_accuracies_read_as_percentages():
    report = {"accuracy": {"dense": 0.8, "pruned": 0.6, "recovered": 0.75}, "metrics": {"accuracy": "higher"}}
    rows = Page(render_html(report)).rows["Quality"]
    assert rows[1] == ["accuracy", "80.00%", "60.00%", "75.00%", "75.0%"]


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_did_not_end_says_so(report, status):
    assert f"This run {'was interrupted' if status == 'interrupted' else 'failed'}." in render_html(
        report | {"status": status}
    )
    assert "This run" not in render_html(report)


def hostile(value):
    """The report with markup in each of its strings and keys that are free text."""
    evil = '<script>alert("1")</script>\'&$x$'
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()} | ({evil: evil} if value else {})
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value}.{evil}" if isinstance(value, str) else value


def test_every_text_is_escaped(reconstructed):
    report = reconstructed
    report["sparsity"]["layers"] = report["sparsity"]["layers"][:9]
    report["training"]["history"] = report["training"]["history"][:3]
    html = render_html(hostile(report))
    page = Page(html)
    assert "<script" not in html
    for shown in (
        "tiny-llama",
        "runs/tiny-llama",
        "held-out",
        "model.layers.0",
        "tied to the",
        "budget reached",
        "Some CPU",
        "masked_lora",
        "model.layers.5",
    ):
        assert re.search(rf"{shown}.*<script>alert", page.text)
    assert not [value for _, name, value in page.attributes if name == "class" and "script" in value]


PATHS = [
    ("perplexity",),
    ("metrics",),
    ("sparsity",),
    ("pruning",),
    ("training",),
    ("gpu_hours",),
    ("seconds",),
    ("memory",),
    ("versions",),
    ("machine",),
    ("perplexity", "dense"),
    ("sparsity", "layers"),
    ("sparsity", "total"),
    ("pruning", "config"),
    ("training", "history"),
    ("gpu_hours", "total"),
    ("gpu_hours", "budget"),
    ("gpu_hours", "stages"),
    ("gpu_hours", "devices"),
]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_whatever_is_missing_the_rest_is_shown(report, path):
    report["sparsity"]["layers"] = report["sparsity"]["layers"][:2]
    *above, last = path
    place = report
    for key in above:
        place = place[key]
    if len(path) == 1:
        del place[last]
    else:
        place[last] = None
    text = Page(render_html(report)).text
    assert report["name"] in text
    assert "None" not in text
    assert ("q_proj" in text) or path[0] == "sparsity"


@pytest.mark.parametrize("draw", [timeline, loss, sparsity])
def test_a_figure_is_one_reproducible_svg_or_nothing(reconstructed, draw):
    report = reconstructed
    before = dict(matplotlib.rcParams)
    svg = draw(report)
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert svg == draw(report)
    assert draw({}) is None
    assert dict(matplotlib.rcParams) == before


def svg_texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_sparsity_map_has_a_cell_for_each_block_and_type(report):
    report["sparsity"]["layers"] += [{"name": "lm_head.weight", "weights": 1000, "zeros": 240}]
    texts = svg_texts(sparsity(report))
    assert texts.count("24") == 1
    assert texts.count("50") >= 42
    assert {"q_proj", "down_proj", "lm_head", "0", "5", "other"} <= set(texts)


def test_layers_of_one_cell_are_averaged_by_weight():
    layers = [
        {"name": f"layers.0.moe.experts.{i}.w1.weight", "weights": w, "zeros": z}
        for i, w, z in ((0, 100, 0), (1, 300, 120))
    ]
    assert "30" in svg_texts(sparsity({"sparsity": {"layers": layers}}))  # 120 of 400


def test_encoder_and_decoder_blocks_are_distinguished():
    layers = [{"name": f"{side}.layers.0.fc1.weight", "weights": 10, "zeros": 5} for side in ("encoder", "decoder")]
    assert {"encoder 0", "decoder 0"} <= set(svg_texts(sparsity({"sparsity": {"layers": layers}})))


def test_networks_without_blocks_have_one_column():
    layers = [{"name": f"net.{i}.weight", "weights": 10, "zeros": i} for i in (0, 2, 4)]
    assert {"net.0", "net.4", "0", "20", "40", "other"} <= set(svg_texts(sparsity({"sparsity": {"layers": layers}})))


def test_of_very_many_types_the_first_are_drawn():
    layers = [{"name": f"net.{i}.weight", "weights": 10, "zeros": 5} for i in range(50)]
    texts = svg_texts(sparsity({"sparsity": {"layers": layers}}))
    assert "net.39" in texts
    assert "net.40" not in texts
    assert any("first 40 of 50" in text for text in texts)


@pytest.mark.parametrize(
    ("spent", "rows", "reported"),
    [
        (
            {"total": 3.0, "budget": 5.0, "stages": {"training": 3.0}},
            [["training", "—", "3.00", "60.0%"]],
            "Left: 2.00.",
        ),
        (
            {"total": 4.0, "budget": 2.0, "stages": {"training": 3.0}},
            [["training", "—", "3.00", "150.0%"], ["other", "—", "1.00", "50.0%"]],
            "Exceeded by: 2.00.",
        ),
        (
            {"total": None, "stages": {"training": 3.0, "export": 1.0}},
            [["training", "—", "3.00", "75.0%"], ["export", "—", "1.00", "25.0%"]],
            "Time and GPU-hours",
        ),
    ],
)
def test_the_hours_add_up_to_the_total_or_the_budget(spent, rows, reported):
    page = Page(render_html({"gpu_hours": spent}))
    found = page.rows["Time and GPU-hours"][1:]
    assert found == rows + ([["total", "—", *found[-1][2:]]] if spent["total"] else [])
    assert reported in page.text


def test_losses_that_are_not_numbers_leave_no_hole(report):
    history = report["training"]["history"]
    whole = loss(report | {"training": {"history": history[1:]}})
    assert loss(report | {"training": {"history": [history[0] | {"loss": float("nan")}, *history[1:]]}}) == whole
