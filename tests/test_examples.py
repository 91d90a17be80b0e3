"""The examples run like a reader would run them, and print what their docstrings say."""

from __future__ import annotations

import ast
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Command

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@dataclass
class Printed:
    """The expected output of an example.

    Attributes:
        lines: Patterns that its lines match.
        figure: The first word of the line with a figure of the dense, the pruned and the recovered model.
        least: What the figures of the dense and the recovered model reach on any machine.
        higher: Whether higher figures are better.
    """

    lines: tuple[str, ...]
    figure: str
    least: float
    higher: bool = True


EXPECTED = {
    "already_sparse": Printed(
        (
            r"existing_zeros=None: 75\.00% zeros, [1-9]\d* existing ones may be trained again",
            r"note: 2 matrices are more than 5% zeros already .* Set existing_zeros to 'keep'",
            r"existing_zeros='keep': 7[5-9]\.\d\d% zeros, 0 existing ones",
            r"existing_zeros='adopt': 70\.00% zeros, 0 existing ones",
            r"all existing zeros are still zero: True",
        ),
        "accuracy:",
        80,
    ),
    "calibration_step": Printed(
        (r"all pruned +6,144 +4,608 +75\.00%", r"74\.23% of the elements of all matrices"), "val_mse", 0.4, False
    ),
    "own_loop_resnet": Printed(
        (
            r"all pruned +46,080 +27,64\d +59\.99%",
            r"56\.\d\d% of the elements of all matrices",
            r"fc\.weight stayed dense: output layer",
        ),
        "val_accuracy",
        80,
    ),
    "own_peft": Printed(
        (
            r"48\.08% of the elements of all matrices",
            r"not merged: lora, kept apart",
            r"largest difference after reloading: 0\.0\n",
            r"zeros in the pruned layers: 50\.00% in the base, 3\d\.\d\d% after merging plain LoRA",
        ),
        "val_perplexity",
        2,
        False,
    ),
    "seq2seq_t5": Printed(
        (r"all pruned +40,960 +20,480 +50\.00%", r"word_error_rate", r"drei vier blau -> three four blue"),
        "token_accuracy",
        80,
    ),
    "student_and_teacher": Printed(
        (
            r"the teacher is unchanged: True",
            r"pruned: student\.0\.weight, student\.2\.weight\n",
            r"student\.4\.weight stayed dense: output layer",
            r"teacher\.2\.weight stayed dense: not reached by the calibration data",
            r"all pruned +8,192 +6,144 +75\.00%",
        ),
        "val_accuracy",
        80,
    ),
    "text_classifier": Printed(
        (
            r"all pruned +16,384 +12,288 +75\.00%",
            r"merged model: masked_lora, without loss, sparsity 75\.00%, in model",
            r"the merged model on disk: 75\.00% zeros in 12 layers",
        ),
        "accuracy",
        90,
    ),
    "vision_language": Printed(
        (
            r"all pruned +20,480 +15,360 +75\.00%",
            r"vision_tower: 0\.00% zeros in its layers",
            r"language_model: 75\.00% zeros in its layers",
        ),
        "val_accuracy",
        60,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_prints_what_it_shows(script, tmp_path):
    assert script.stem in EXPECTED, "add the expected output of the new example here"
    expected = EXPECTED[script.stem]
    # For the folders that an example leaves to its reader.
    run = Command(["python", script], ROOT, {"TMPDIR": str(tmp_path)}).wait()
    assert run.returncode == 0, run.stderr[-3000:]
    for line in expected.lines:
        assert re.search(line, run.stdout), f"no line like {line!r} in:\n{run.stdout}"
    dense, pruned, recovered = figures(run.stdout, expected.figure)
    better = max if expected.higher else min
    # The dense and the recovered model have learned the task, and recovery improves the pruned model.
    assert better(dense, expected.least) == dense
    assert better(recovered, expected.least) == recovered
    assert better(recovered, pruned) == recovered


def figures(printed: str, name: str) -> list[float]:
    """The first three numbers of the first line that begins with a name and has at least three."""
    rows = [re.findall(r"\d+\.\d+", line) for line in printed.splitlines() if line.split()[:1] == [name]]
    return [float(number) for number in next(row for row in rows if len(row) >= 3)[:3]]


def test_the_page_of_the_examples_lists_all():
    page = (ROOT / "examples/README.md").read_text()
    assert sorted(re.findall(r"`python examples/(\w+)\.py`", page)) == [script.stem for script in SCRIPTS]
    assert EXPECTED.keys() == {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_uses_only_public_names(script):
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if node.module.partition(".")[0] == "sparsefit"]
    assert own
    for node in own:
        assert node.module in ("sparsefit", "sparsefit.data", "sparsefit.modules")
        assert {name.name for name in node.names} <= set(importlib.import_module(node.module).__all__)
