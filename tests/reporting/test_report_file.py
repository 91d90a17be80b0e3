from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsefit.errors import RunFolderError
from sparsefit.reporting import formats, read_json, write_json
from sparsefit.reporting import report as reading
from sparsefit.reporting.report import distance_from_control, layer_type, share_won_back


def test_a_report_reads_back_as_it_was_written(report, tmp_path):
    path = write_json(report, tmp_path / "run" / "report.json")
    assert read_json(path) == report
    assert os.listdir(path.parent) == ["report.json"]


def test_the_file_is_strict_json(tmp_path):
    values = {"nan": math.nan, "inf": [math.inf, -math.inf, 1.5], "tensor": torch.tensor([1.0, math.nan])}
    values |= {
        "float32": np.float32(0.5),
        "count": np.int64(3),
        "path": Path("a/b"),
        "dtype": torch.bfloat16,
        7: {"b", "a"},
    }
    path = write_json(values, tmp_path / "report.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == {
        "nan": None,
        "inf": [None, None, 1.5],
        "tensor": [1.0, None],
        "float32": 0.5,
        "count": 3,
        "path": "a/b",
        "dtype": "torch.bfloat16",
        "7": ["a", "b"],
    }


def test_the_layout_does_not_depend_on_the_order_of_filling(tmp_path):
    one = write_json({"b": 1, "a": {"d": 2, "c": 3}}, tmp_path / "one.json")
    two = write_json({"a": {"c": 3, "d": 2}, "b": 1}, tmp_path / "two.json")
    assert one.read_bytes() == two.read_bytes()


def test_a_write_that_fails_leaves_the_older_report_whole(report, tmp_path, monkeypatch):
    path = write_json({"name": "older"}, tmp_path / "report.json")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"No space left.*Free some space"):
        write_json(report, path)
    assert read_json(path) == {"name": "older"}
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_folder_that_cannot_be_made_is_a_run_folder_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_json({}, tmp_path / "file" / "report.json")


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_reading_what_is_no_report_says_so(tmp_path, content):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"report\.json"):
        read_json(path)


@pytest.mark.parametrize(
    ("values", "metric", "better", "share"),
    [
        ((10.0, 1000.0, 100.0), "perplexity", "lower", 0.5),  # one decade of two
        ((4.0, 16.0, 8.0), "perplexity", "lower", 0.5),
        ((4.0, 16.0, 4.0), "perplexity", "lower", 1.0),
        ((4.0, 16.0, 2.0), "wikitext_perplexity", "lower", 1.5),
        ((4.0, 16.0, 32.0), "perplexity", "lower", -0.5),
        ((0.8, 0.6, 0.75), "accuracy", "higher", 0.75),
        ((2.0, 3.0, 2.25), "loss", "lower", 0.75),
    ],
)
def test_share_won_back_by_hand(values, metric, better, share):
    assert share_won_back(*values, metric, better) == pytest.approx(share)


@pytest.mark.parametrize(
    ("metric", "values", "distance"),
    [
        ("perplexity", {"recovered": 20.0, "control": 10.0}, math.log(2)),
        ("val_perplexity", {"recovered": 10.0, "control": 20.0}, -math.log(2)),
        ("accuracy", {"recovered": 0.5, "control": 0.75}, -0.25),
        ("perplexity", {"recovered": 20.0}, None),
        ("perplexity", {"recovered": 0.0, "control": 10.0}, None),
        ("accuracy", {"control": 0.75}, None),
    ],
)
def test_distance_from_the_control(metric, values, distance):
    found = distance_from_control({"metrics": {metric: "lower"}, metric: values}, metric)
    assert found == (None if distance is None else pytest.approx(distance))


@pytest.mark.parametrize(
    "values",
    [(None, 2.0, 1.0), (1.0, 2.0, None), (1.0, math.inf, 2.0), (2.0, 2.0, 2.0), (2.0, 1.5, 1.4), (0.0, 2.0, 1.0)],
)
def test_share_won_back_is_none_where_nothing_was_lost_or_known(values):
    assert share_won_back(*values) is None


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "q_proj", ("model.layers", (0,))),
        ("model.layers.11.mlp.down_proj.weight", "down_proj", ("model.layers", (11,))),
        (
            "base_model.model.model.layers.2.self_attn.v_proj.base_layer.weight",
            "v_proj",
            ("base_model.model.model.layers", (2,)),
        ),
        ("transformer.h.3.attn.c_attn.weight", "c_attn", ("transformer.h", (3,))),
        ("transformer.h.3.attn.c_proj.weight", "attn.c_proj", ("transformer.h", (3,))),
        ("transformer.h.3.mlp.c_proj.weight", "mlp.c_proj", ("transformer.h", (3,))),
        ("model.decoder.layers.5.self_attn.out_proj.weight", "out_proj", ("model.decoder.layers", (5,))),
        ("model.decoder.layers.5.fc1.weight", "fc1", ("model.decoder.layers", (5,))),
        ("model.layers.1.block_sparse_moe.experts.3.w1.weight", "w1", ("model.layers", (1,))),
        ("model.layers.1.mlp.experts.gate_up_proj", "gate_up_proj", ("model.layers", (1,))),
        ("layers.0.self_attn.in_proj_weight", "in_proj_weight", ("layers", (0,))),
        ("encoder.layer.4.attention.output.dense.weight", "attention.output.dense", ("encoder.layer", (4,))),
        ("stages.1.blocks.2.mlp.fc1.weight", "fc1", ("stages", (1, 2))),
        ("features.1.0.block.3.weight", "block.3", ("features", (1, 0))),
        ("net.2.weight", "net.2", None),
        ("lm_head.weight", "lm_head", None),
        ("weight", "weight", None),
    ],
)
def test_a_name_tells_type_and_block(name, kind, block):
    assert layer_type(name) == kind
    assert reading.block_of(name) == block


def test_layers_sum_up_by_type(report):
    layers = report["sparsity"]["layers"]
    types = reading.sparsity_by_type(report)
    assert list(types) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert types["k_proj"] == {"layers": 6, "weights": 6 * 128 * 256, "zeros": 6 * 128 * 128}
    for key in ("weights", "zeros"):
        assert sum(entry[key] for entry in types.values()) == sum(layer[key] for layer in layers)


def test_stages_come_in_the_order_of_a_run():
    stages = {"unheard of": 1.0, "training": 2.0, "calibration and pruning": 3.0, "evaluation": 4.0}
    read = reading.stages({"seconds": {"stages": stages}, "gpu_hours": {"stages": {"training": 0.5}}})
    assert [name for name, _, _ in read] == ["calibration and pruning", "training", "evaluation", "unheard of"]
    assert read[1] == ("training", 2.0, 0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.seconds(3.24), "3.2 s"),
        (formats.seconds(59.99), "1 min 00 s"),
        (formats.seconds(7805), "2 h 10 min"),
        (formats.size(1610612736), "1.50 GiB"),
        (formats.size(1023), "1023 B"),
        (formats.hours(4.9871), "4.99"),
        (formats.hours(0.00123), "0.00123"),
        (formats.hours(1234.5), "1,234"),
        (formats.hours(0.0), "0"),
        (formats.metric("perplexity", 7.2567), "7.26"),
        (formats.metric("perplexity", 48211.4), "48,211.4"),
        (formats.metric("accuracy", 0.8212), "82.12%"),
        (formats.metric("perplexity", None), "—"),
        (formats.value(True), "yes"),
        (formats.value(["cuda:0", "cuda:1"]), "cuda:0, cuda:1"),
        (formats.value([]), "—"),
        (formats.value(8 * 2**30, "memory_bytes"), "8.00 GiB"),
        (formats.value(0.5, "sparsity"), "50.00%"),
        (formats.value(1e-4, "learning_rate"), "0.0001"),
        (formats.value(49152), "49,152"),
        (formats.name("peak_memory_bytes"), "peak memory"),
    ],
)
def test_numbers_for_people(text, expected):
    assert text == expected


TIMELINE = [
    {"stage": "recovered", "gpu_hours": 0.4, "step": 9, "metric": "perplexity", "value": 5.0 * math.e},
    {"stage": "validation", "gpu_hours": 0.3, "step": 9, "metric": "perplexity", "value": 4.0},
    {"stage": "dense", "gpu_hours": 0.1, "step": 0, "metric": "perplexity", "value": 5.0},
    {"stage": "pruned", "gpu_hours": 0.2, "step": 0, "metric": "accuracy", "value": 0.5},
    {"stage": "pruned", "gpu_hours": None, "step": 0, "metric": "perplexity", "value": 7.0},
    {"stage": "pruned", "gpu_hours": 0.2, "step": 0, "metric": "perplexity", "value": math.nan},
    "no entry",
]


def test_a_timeline_is_read_in_order_without_what_is_no_number():
    moments = reading.timeline({"timeline": TIMELINE}, "perplexity")
    assert [(moment.stage, moment.hours) for moment in moments] == [
        ("dense", 0.1),
        ("validation", 0.3),
        ("recovered", 0.4),
    ]
    assert reading.timeline({}, "perplexity") == reading.timeline({"timeline": None}, "perplexity") == []


def test_nats_are_counted_from_the_dense_model_on_the_same_data():
    report = {"timeline": TIMELINE, "metrics": {"perplexity": "lower", "accuracy": "higher"}}
    lost = [reading.nats_lost(report, "perplexity", moment) for moment in reading.timeline(report, "perplexity")]
    assert lost == [0.0, None, pytest.approx(1.0)]
    assert reading.nats_lost(report, "accuracy", reading.timeline(report, "accuracy")[0]) is None
