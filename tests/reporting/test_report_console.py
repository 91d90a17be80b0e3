from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from sparsefit.reporting import console as terminal
from sparsefit.reporting import stage_progress, summary


def printed(renderable, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def lines(monkeypatch):
    """What a run prints where there is no terminal."""
    output = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=output, width=80))
    return lambda: output.getvalue().splitlines()


def test_the_summary_holds_the_values(report):
    text = printed(summary(report))
    for line in (
        "perplexity 18.25 26.75 20.50 69.6%",
        "q_proj 393,216 196,608 50.00% 6",
        "training 1 min 52 s 0.0310 62.0%",
        "total 2 min 29 s 0.0415 83.0%",
    ):
        assert line in [" ".join(row.split()) for row in text.splitlines()]
    for value in ("budget", "0.0500", "1.50 GiB process memory (CPU)", report["folder"], "finished", "200 steps"):
        assert value in text


def test_a_control_is_shown_next_to_the_recovered_model(report, controlled):
    rows = [" ".join(row.split()) for row in printed(summary(controlled), width=120).splitlines()]
    # As before, with ln 20.5 - ln 16 in another column.
    assert "perplexity 18.25 26.75 20.50 16.00 69.6% +0.248 nats" in rows
    assert "dense pruned recovered control won back distance from control" in rows
    assert (
        "control: finished, 200 steps, 0.0250 GPU-hours, not counted in those of the run, without the teacher" in rows
    )
    assert "total 2 min 29 s 0.0415 83.0%" in rows
    assert "control" not in printed(summary(report))
    assert "compare the recovered model" not in printed(summary(controlled))
    controlled["perplexity"]["control"] = 19.0  # above dense
    reported = " ".join(printed(summary(controlled)).split())
    assert (
        "makes the dense model worse in perplexity: compare the recovered model with the dense model instead"
        in reported
    )


def test_a_summary_prints_whatever_is_missing(any_report):
    text = printed(summary(any_report))
    assert str(any_report.get("name", "run")) in text
    assert "None" not in text


def test_names_are_not_read_as_markup(report):
    report["name"], report["folder"] = "[red]run[/red]", "runs/[bold]x"
    assert "[red]run[/red]" in printed(summary(report))
    assert "runs/[bold]x" in printed(summary(report))


@pytest.mark.parametrize("total", [3, 128, 100_000])
def test_a_log_gets_a_start_quarters_and_an_end(lines, total):
    with stage_progress("calibration [1/2]", total) as advance:
        for _ in range(total):
            advance()
    assert lines()[0] == f"calibration [1/2]: started, {total} to do"
    assert lines()[-1].startswith(f"calibration [1/2]: done, {total} of {total}, ")
    assert lines()[-1].endswith(" s")
    assert len(lines()) == 2 + min(3, total - 1)


def test_a_log_of_unknown_length_gets_two_lines(lines):
    with stage_progress("evaluation") as advance:
        for _ in range(1000):
            advance(2)
    assert [line.split(",")[0] for line in lines()] == ["evaluation: started", "evaluation: done"]
    assert "2000" in lines()[-1]


def test_a_log_tells_the_time_left_soon_and_at_each_quarter(lines, monkeypatch):
    clock = iter([0.0, 4.0, 12.0, 16.0, 24.0, 28.0, 400.0, 400.0, 400.0, 400.0, 400.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with stage_progress("evaluating", 100) as advance:
        for units in (1, 2, 1, 21, 1):
            advance(units)
    assert lines()[1:3] == [
        "evaluating: 3 of 100, 12.0 s, about 6 min 28 s left",
        "evaluating: 25 of 100, 24.0 s, about 1 min 12 s left",
    ]
    assert len(lines()) == 4


def test_a_total_may_come_to_be_known_on_the_way(lines):
    with stage_progress("reconstructing") as advance:
        for _ in range(4):
            advance(total=4)
    assert lines()[0] == "reconstructing: started"
    assert lines()[1].startswith("reconstructing: 1 of 4, ")
    assert lines()[-1].startswith("reconstructing: done, 4 of 4, ")


def test_a_stage_that_fails_is_not_reported_as_done(lines):
    def fail():
        with stage_progress("pruning", 8) as advance:
            advance(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert lines()[-1].startswith("pruning: stopped, 3 of 8, ")


def test_a_silent_rank_prints_nothing(lines):
    with stage_progress("pruning", 8, visible=False) as advance:
        advance()
    assert lines() == []


def test_a_terminal_gets_a_bar_and_stages_may_nest(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=output, width=80, force_terminal=True))
    with stage_progress("outer", 2) as outer, stage_progress("inner", 5) as inner:
        inner(5)
        outer()
    assert "outer" in output.getvalue()
    assert "inner" in output.getvalue()
    with stage_progress("after", 1) as advance:
        advance()
    assert "1/1" in output.getvalue()


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, sparsefit; before = set(sys.modules); import sparsefit.reporting;"
    code += "print(sorted((set(sys.modules) - before) & {'torch', 'matplotlib', 'numpy', 'transformers', 'lightning'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
