"""The table of a study: complete at any time, and read back bit for bit."""

from __future__ import annotations

import math

import pytest

from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.study import Results

ROW = {
    "model": "a, b",
    "stage": "pruned",
    "score": "wanda",
    "granularity": "layer",
    "update": "none",
    "pattern": "",
    "sparsity": 0.1 + 0.2,
    "counted": 1 / 3,
    "accuracy": 0.1,
    "selection_seconds": 1e-9,
    "evaluation_seconds": 2.0,
    "digest": "d" * 64,
}


def test_rows_are_read_back_as_they_were(tmp_path):
    results = Results(tmp_path / "deep" / "results.csv", ["accuracy"])
    results.add(ROW)
    results.add({**ROW, "sparsity": 0.5, "error": 'ValueError: "x",\ny', "accuracy": None})
    results.add({**ROW, "sparsity": 0.6, "accuracy": math.inf})
    again = Results(results.file, ["accuracy"])
    assert again.rows == results.rows
    assert again.find(model="a, b", sparsity=0.1 + 0.2)["counted"] == 1 / 3
    assert again.find(sparsity=0.5) is None  # it failed
    assert again.find(sparsity=0.6)["accuracy"] == math.inf
    assert [file.name for file in results.file.parent.iterdir()] == ["results.csv"]


def test_a_row_takes_the_place_of_the_earlier_one(tmp_path):
    results = Results(tmp_path / "results.csv", ["accuracy"])
    results.add({**ROW, "error": "RuntimeError: out of memory"})
    results.add(ROW)
    results.add({**ROW, "stage": "finetuned", "epochs": 2})
    assert [(row["stage"], row["error"]) for row in results.rows] == [("pruned", ""), ("finetuned", "")]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "\x00\x00", "", None])
def test_another_table_is_refused_and_left_alone(tmp_path, text):
    file = tmp_path / "results.csv"
    if text is None:
        Results(file, ["accuracy"]).add(ROW)
        file.write_text(text := file.read_text().replace("0.1\n", "").replace(",2.0,", ",two,"))
    else:
        file.write_text(text)
    with pytest.raises(RunFolderError, match="another folder"):
        Results(file, ["accuracy"])
    assert file.read_text() == text


def test_other_metrics_are_another_table(tmp_path):
    Results(tmp_path / "results.csv", ["accuracy"]).add(ROW)
    with pytest.raises(RunFolderError, match="no column 'perplexity'"):
        Results(tmp_path / "results.csv", ["perplexity"])


def test_a_metric_of_the_name_of_a_column_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'error'"):
        Results(tmp_path / "results.csv", ["accuracy", "error"])
