from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
from study_rows import pruned, row, text_rows, text_study, vision_rows, vision_study

from sparsefit.reporting import study_figures as figures
from sparsefit.reporting.study_figures import draw_panels, study_figures
from sparsefit.reporting.study_results import read_results

pytestmark = pytest.mark.figures

SVG = "{http://www.w3.org/2000/svg}"
ONE = vision_study(("deit",))


def score_panels(study, rows):
    return figures.score_panels(read_results(study, rows))


def granularity_panels(study, rows):
    return figures.granularity_panels(read_results(study, rows))


def texts(svg):
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def files():
    rows = list(vision_rows(("deit",), ("magnitude", "wanda"), sparsities=(0.5, 0.8)))
    return study_figures(ONE, rows)


def test_the_files_stand_alone(files):
    assert list(files) == ["scores", "granularities"]
    for text in files.values():
        svg = ElementTree.fromstring(text)
        assert svg.tag == f"{SVG}svg"
        assert float(svg.get("width").removesuffix("pt")) > 300
        assert "prefers-color-scheme: dark" in text
        assert svg.get("role") == "img"
        assert not re.findall(r"(?:href=\"|url\()(?!#)", text)


def test_the_label_says_what_is_drawn(files):
    label = ElementTree.fromstring(files["granularities"]).get("aria-label")
    assert label == "deit, magnitude: accuracy against sparsity; deit, wanda: accuracy against sparsity"


def test_the_key_names_scores_stages_and_patterns(files):
    assert {"magnitude", "wanda", "pruned", "after 2 epochs", "2:4", "deit", "per layer", "50%", "80%"} <= set(
        texts(files["scores"])
    )
    assert {"per output", "per layer", "magnitude", "wanda"} <= set(texts(files["granularities"]))


@pytest.mark.parametrize(
    ("granularities", "metric", "shown"),
    [
        (("output", "layer"), "accuracy", "per layer"),
        (("output", "input"), "accuracy", "per output"),
        (("output", "layer"), "perplexity", "per output"),
        (("(output, 128)",), "accuracy", "per 128 outputs"),
        (("variant",), "accuracy", "variant"),
    ],
)
def test_scores_are_compared_at_one_granularity(granularities, metric, shown):
    rows = [pruned(granularity=g, **{metric: 0.5 + index}) for index, g in enumerate(granularities)]
    study = ONE | {"metrics": {metric: "higher" if metric == "accuracy" else "lower"}}
    (panel,) = score_panels(study, rows)
    assert panel.subtitle == shown
    assert [line.points for line in panel.lines] == [[(0.5, 0.5 + (shown == "per layer"))]]


def test_scores_of_different_granularities_say_so():
    rows = [
        pruned("magnitude", accuracy=0.4),
        pruned("wanda", granularity="output", accuracy=0.6),
        pruned("ria", granularity="output", accuracy=0.6),
    ]
    (panel,) = score_panels(ONE, rows)
    assert panel.subtitle == "per layer: magnitude; per output: wanda, ria"


def test_a_score_and_a_stage_keep_their_colour_in_all_panels():
    panels = score_panels(vision_study(), list(vision_rows()))
    colours = [{line.name: line.colour for line in panel.lines} for panel in panels]
    assert len(panels) == 2
    assert colours[0] == colours[1]
    assert len(set(colours[0].values())) == 3


def test_granularities_have_a_panel_for_each_model_and_score_with_several():
    rows = list(vision_rows(scores=("wanda", "ria"), sparsities=(0.5,), epochs=0))
    rows.append(row("deit-small", "pruned", score="magnitude", granularity="layer", sparsity=0.5, accuracy=0.3))
    panels = granularity_panels(vision_study(), rows)
    assert [(panel.title, panel.subtitle) for panel in panels] == [
        (model, score) for model in ("convnext-tiny", "deit-small") for score in ("wanda", "ria")
    ]
    assert {line.name for panel in panels for line in panel.lines} == {"per output", "per layer"}
    assert granularity_panels(vision_study(), list(vision_rows(granularities=("layer",)))) == []


def test_patterns_are_joined_to_nothing():
    (panel,) = score_panels(ONE, list(vision_rows(("deit",), ("wanda",), epochs=0)))
    lines = {line.pattern: [x for x, _ in line.points] for line in panel.lines}
    assert lines == {"": [0.5, 0.6, 0.7, 0.8], "2:4": [0.5]}


def test_orders_are_distinguished_where_a_score_has_several():
    (panel,) = score_panels(text_study(), text_rows())
    found = {(line.name, line.order) for line in panel.lines if not line.pattern}
    assert found == {("magnitude", ""), *((s, o) for s in ("wanda", "sparsegpt") for o in ("", "update block"))}
    assert "update block" in texts(draw_panels([panel]))


@pytest.mark.parametrize("updates", [("none", "block"), ("block",)])
def test_points_that_were_pruned_in_another_order_are_marked(updates):
    rows = [pruned(update=u, used_update="none", sparsity=s, accuracy=0.7) for u in updates for s in (0.5, 0.6)]
    rows.append(pruned("magnitude", accuracy=0.5))
    (panel,) = score_panels(ONE, rows)
    orders = {(line.name, line.order): [x for x, _ in line.points] for line in panel.lines}
    marked = "update block, pruned in the order none"
    assert orders["wanda", marked] == [0.5, 0.6]
    assert ("magnitude", "") in orders
    assert marked in texts(draw_panels([panel]))
    as_asked = score_panels(ONE, [line | {"used_update": line["update"]} for line in rows])
    assert not any("pruned in" in text for text in texts(draw_panels(as_asked)))


@pytest.mark.parametrize(
    ("values", "reported"),
    [
        ((12.0, 20.0, 50.0), None),
        ((12.0, 20.0, 5000.0), "▲ off the scale: 5,000.0 at 70%"),
        ((12.0, 20.0, math.inf), "▲ off the scale: inf at 70%"),
        ((12.0, math.inf, 1e30), "▲ off the scale: inf at 60%, 1.00e+30 at 70%"),
    ],
)
def test_a_perplexity_that_exploded_is_off_the_scale(values, reported):
    study = ONE | {"metrics": {"perplexity": "lower"}}
    rows = [row("deit", perplexity=10.0)]
    rows += [pruned("wanda", x, perplexity=y) for x, y in zip((0.5, 0.6, 0.7), values, strict=True)]
    found = texts(draw_panels(score_panels(study, rows)))
    assert [text for text in found if "off the scale" in text] == ([reported] if reported else [])
    assert "perplexity (log scale, lower is better)" in found
    ticks = [float(text.replace(",", "")) for text in found if re.fullmatch(r"[\d,.]+", text)]
    assert 5 <= min(ticks) <= max(ticks) <= 60


def test_all_infinite_values_can_be_drawn():
    study = ONE | {"metrics": {"perplexity": "lower"}}
    rows = [pruned("wanda", x, perplexity=math.inf) for x in (0.5, 0.6, 0.7, 0.8)]
    assert "▲ off the scale: 4 points, up to inf" in texts(draw_panels(score_panels(study, rows)))


@pytest.mark.parametrize("value", [None, math.nan, -math.inf, math.inf, "0.5"])
def test_what_is_no_value_is_not_drawn(value):
    assert score_panels(ONE, [pruned(accuracy=value)]) == []
    (panel,) = score_panels(ONE, [pruned(accuracy=value), pruned(sparsity=0.6, accuracy=0.25)])
    assert [line.points for line in panel.lines] == [[(0.6, 0.25)]]


@pytest.mark.parametrize("models", [1, 3, 6])
def test_any_number_of_models_fits(models):
    names = tuple(f"model {index}, whose name is as long as names of models sometimes are" for index in range(models))
    rows = list(vision_rows(names, ("wanda",), ("layer",), (0.5,), epochs=0))
    before = dict(matplotlib.rcParams)
    figures = study_figures({"metrics": {"accuracy": "higher"}}, rows)
    assert list(figures) == ["scores"]
    assert sum(text.startswith("model ") and text.endswith("…") for text in texts(figures["scores"])) == models
    assert dict(matplotlib.rcParams) == before


def test_seeds_are_drawn_as_a_mean_with_a_bar():
    values = {0.5: (0.6, 0.64), 0.6: (0.5, 0.5)}
    rows = [pruned(sparsity=s, accuracy=v, calibration_seed=k) for s, own in values.items() for k, v in enumerate(own)]
    (panel,) = score_panels(ONE, [*rows, pruned("magnitude", accuracy=0.4)])
    lines = {line.name: line for line in panel.lines}
    assert lines["wanda"].points == [(0.5, pytest.approx(0.62)), (0.6, 0.5)]
    assert lines["wanda"].spreads == {0.5: pytest.approx(0.0283, abs=1e-4), 0.6: 0.0}
    assert not lines["magnitude"].spreads
    bare = panel._replace(lines=[line._replace(spreads={}) for line in panel.lines])
    assert draw_panels([panel]).count("<use") > draw_panels([bare]).count("<use")  # the ends of the bars


def test_nothing_gives_no_figures():
    assert study_figures({}, []) == {}
    assert study_figures(ONE | {"seconds": {"other": 0.0}}, [row("deit", accuracy=0.8)]) == {}


def test_markup_in_names_is_escaped():
    rows = [row("<b>&", accuracy=0.8), row("<b>&", "pruned", score="<i>", sparsity=0.5, accuracy=0.7)]
    found = texts(study_figures({"metrics": {"accuracy": "higher"}}, rows)["scores"])
    assert {"<b>&", "<i>"} <= set(found)


@pytest.mark.parametrize("letters", [4, 14, 40])
def test_the_key_is_no_wider_than_its_figure(letters):
    names = [f"{score:{letters}}".replace(" ", "e") for score in ("a", "b", "c", "d")]
    svg = draw_panels(score_panels(ONE, [pruned(name, accuracy=0.5) for name in names]))
    root = ElementTree.fromstring(svg)
    width = float(root.get("viewBox").split()[2])
    keys = [line for line in root.iter(f"{SVG}text") if "".join(line.itertext()) in names]
    places = [float(line.get("x")) for line in keys]
    assert len(places) == 4
    assert min(places) > 15
    assert max(places) + 4.2 * letters < width
    assert (len(set(places)) > 1) == (letters < 40)
