from __future__ import annotations

from html_page import Page
from rich.console import Console

from sparsefit.reporting import render_html, summary
from sparsefit.reporting.run_tables import task_rows, tasks


def reported(acc, norm=None, **more):
    result = {"acc": acc, "acc_stderr": 0.01, "items": 200, "version": 1.0, "truncated": 0}
    return result | ({"acc_norm": norm, "acc_norm_stderr": 0.02} if norm is not None else {}) | more


TASKS = {
    "recovered": {"boolq": reported(0.65), "hellaswag": reported(0.3, 0.4)},
    "dense": {"boolq": reported(0.7, truncated=3), "hellaswag": reported(0.35, 0.45)},
    "pruned": {"boolq": reported(0.6), "hellaswag": reported(0.25, 0.35)},
}


def test_a_row_for_each_accuracy():
    rows = task_rows({"tasks": TASKS})
    assert [(row.task, row.metric) for row in rows] == [
        ("boolq", "acc"),
        ("hellaswag", "acc"),
        ("hellaswag", "acc_norm"),
    ]
    assert rows[2].values == {"dense": 0.45, "pruned": 0.35, "recovered": 0.4}
    assert list(rows[0].values) == ["dense", "pruned", "recovered"]
    assert rows[0].accuracies["pruned"].error == 0.01


def test_what_is_missing_is_left_out():
    assert task_rows({}) == task_rows({"tasks": None}) == task_rows({"tasks": {"dense": {"boolq": 3}}}) == []
    (row,) = task_rows({"tasks": {"pruned": {"rte": {"acc": 0.5, "acc_norm": None}}}})
    assert (row.values, row.items, row.accuracies["pruned"].error) == ({"pruned": 0.5}, None, None)
    assert tasks({}).rows == []
    assert "Zero-shot tasks" not in Page(render_html({})).headings


def test_on_the_terminal():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary({"name": "run", "status": "finished", "tasks": TASKS}))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "boolq acc 70.00% 60.00% 65.00% 50.0%" in lines
    assert "hellaswag acc_norm 45.00% 35.00% 40.00% 50.0%" in lines


def test_on_the_page():
    html = render_html({"name": "run", "tasks": TASKS | {"dense": {"<i>": reported(0.5), **TASKS["dense"]}}})
    page = Page(html)
    rows = page.rows["Zero-shot tasks"]
    assert rows[0] == ["task", "dense", "pruned", "recovered", "items", "version"]
    assert ["hellaswag acc_norm", "45.00% ± 2.00", "35.00% ± 2.00", "40.00% ± 2.00", "200", "1.0"] in rows
    assert "3 requests of boolq were longer than the context" in page.text
    assert "<i> acc" in [row[0] for row in rows]
    assert "<i>" not in html
