"""scripts/reproduce/paper.py: every table and figure on the package's small model, in sizes that take seconds."""

from __future__ import annotations

import csv
import json
import logging
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_models import save_llama

from sparsefit import PruningConfig, prune
from sparsefit.data import PythonDocsDataModule
from sparsefit.errors import MaskError
from sparsefit.evaluation import perplexity
from sparsefit.modules.loading import load_causal_lm
from sparsefit.pruning.scores import SCORES

pytestmark = pytest.mark.figures

SCRIPTS = Path(__file__).parents[1] / "scripts" / "reproduce"
SIZES = "--samples 2 --most-samples 2 --length 24 --windows 2 --steps 2 --repeats 1 --limit 1 --seeds 0 1"
TEXTS = "--train python-docs:train --calibration python-docs:calibration --test python-docs:test --drawing pack"
# Of each table at least a row and a column, and none that takes long.
ROWS = ("Wanda", "magnitude, 50%", "l1", "Wanda, block", "OWL")
COLUMNS = ("50%", "none", "sequential", "layer", "output")
OTHERS = ("costs", "norms", "orders", "allocation")
NOT_ON_A_CPU = "Not measured: it is on the cpu: 2:4 tensors need a GPU of compute capability 8.0 or newer."


@pytest.fixture(autouse=True, scope="module")
def own_scores():
    """The scores that the scripts register do not outlast these tests."""
    with patch.dict(SCORES):
        yield


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a Llama of two blocks and the tokenizer of the package's small model."""
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, hidden_size=40, intermediate_size=80)  # rows of which each tenth is a whole number
    return str(folder)


@pytest.fixture
def paper(monkeypatch, model):
    """Runs the command; gives what it returns to the shell. What it sets for its process does not outlast the test."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level

    def run(output, *arguments):
        threads = torch.get_num_threads()
        options = [*SIZES.split(), *TEXTS.split(), *arguments]
        command = ["paper.py", "--model", model, "--output", str(output), "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / "paper.py"), run_name="__main__")
        assert torch.get_num_threads() == threads
        return ended.value.code

    yield run
    logger.setLevel(level)


def points_in(folder):
    return [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_tables_are_written_and_a_second_command_measures_only_what_is_missing(paper, model, tmp_path, capsys):
    wanted = ("--tables", "perplexity", "time", "speedup", "finetuning", "groups", "updates", "sparsities", "samples",
              "seeds", *OTHERS, "--rows", *ROWS, "--columns", *COLUMNS)  # fmt: skip
    assert paper(tmp_path, *wanted) == 1  # as the speed-up cannot be measured on a CPU
    page = (tmp_path / "tables.md").read_text()
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "Perplexity of pruned models",
        "Seconds to choose what to prune",
        "Speed-up of 2:4 products",
        "LoRA and full fine-tuning after Wanda",
        "Metric and comparison group, 50%",
        "Weight update",
        "Perplexity and sparsity",
        "Perplexity and calibration samples, 50%",
        "Calibration sets",
        "Seconds, layer errors and sparsity counted",
        "Norm of the inputs",
        "Order: what the statistics come from",
        "Allocation of the sparsity",
    ]
    assert NOT_ON_A_CPU in page
    assert "2 windows of 24 tokens of python-docs:calibration (pack), seed 0" in page
    assert "these figures are of less" in page
    assert f"paper.py --model {model} --output {tmp_path} " in page
    for line in ("| magnitude, 50% | ", "| LoRA | ", "| full | ", "| Wanda, block | "):
        assert line in page

    points = points_in(tmp_path)
    for entry in points:
        pruning = entry["point"]["pruning"]
        if pruning is not None:
            assert entry["figures"]["sparsity"] == pytest.approx(pruning.get("sparsity", 0.5), abs=0.006)
    for name, axis, xs in (("sparsities", "sparsity", [k / 10 for k in range(1, 9)]),
                           ("samples", "calibration samples", [1, 2])):  # fmt: skip
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.reader(file))
        assert rows[0] == [axis, "dense", "Wanda"]
        assert [float(row[0]) for row in rows[1:]] == xs
        assert all(float(value) > 1 for row in rows[1:] for value in row[1:])
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / f"{name}.svg").read_text()

    lines = (tmp_path / "points.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "points.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])  # as if killed while it was written
    capsys.readouterr()
    paper(tmp_path, *wanted)
    assert capsys.readouterr().out.count(" points left") == 1
    again = [entry["point"] for entry in points_in_spite_of_a_cut(tmp_path)]
    assert again == [entry["point"] for entry in points]
    assert (tmp_path / "tables.md").read_text().count("|") == page.count("|")


def points_in_spite_of_a_cut(folder):
    return [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.mark.slow
def test_a_cell_is_the_perplexity_of_a_model_pruned_by_hand(paper, tmp_path):
    assert (
        paper(tmp_path, "--model", "tiny-llama", "--tables", "perplexity", "--rows", "Wanda", "--columns", "2:4") == 0
    )
    data = PythonDocsDataModule(sequence_length=24, calibration="pack", calibration_samples=2, test_windows=2)
    model = load_causal_lm("tiny-llama")
    prune(model, data.calibration_dataloader(), PruningConfig(pattern="2:4"))
    by_hand = perplexity(model, data.test_dataloader())
    (figures,) = [entry["figures"] for entry in points_in(tmp_path) if entry["point"]["pruning"] == {"pattern": "2:4"}]
    assert figures["perplexity"] == pytest.approx(by_hand, rel=1e-4)
    assert f"| Wanda | {figures['perplexity']:.2f} |" in (tmp_path / "tables.md").read_text()


@pytest.mark.slow
def test_other_sizes_are_other_points(paper, tmp_path):
    wanted = ("--tables", "perplexity", "--rows", "Wanda", "magnitude", "--columns", "50%")
    paper(tmp_path, *wanted)
    assert len(points_in(tmp_path)) == 3
    paper(tmp_path, *wanted, "--samples", "3")
    assert len(points_in(tmp_path)) == 4  # dense and magnitude read no calibration data
    paper(tmp_path, *wanted, "--windows", "1")
    assert len(points_in(tmp_path)) == 7


def test_the_zero_shot_table_has_dense_and_pruned_models(paper, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sparsefit[tasks]'")
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "evaluation"))
    from test_task_rows import ITEMS

    for task, (line, _) in ITEMS.items():
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(line) + "\n")
    folder = ("--tasks-folder", str(tmp_path))
    assert paper(tmp_path, "--tables", "zero-shot", "--rows", "magnitude", "--columns", "50%", *folder) == 0
    lines = (tmp_path / "tables.md").read_text().splitlines()
    for start in ("| dense |", "| magnitude, 50% |", "| items | 1 | 1 | 1 | 1 | 1 | 1 | 1 | - |"):
        assert any(line.startswith(start) for line in lines)


def test_without_the_items_of_the_tasks_the_reason_stands_in_the_place_of_the_table(paper, tmp_path):
    assert paper(tmp_path, "--tables", "zero-shot", "--tasks-folder", str(tmp_path / "none")) == 1
    assert f"Not measured: there is no folder {tmp_path / 'none'}." in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (("--rows", "wander"), "no table has the rows ['wander']"),
        (("--samples", "0"), "--samples 0: give a whole number of 1 or more"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(paper, tmp_path, capsys, arguments, reported):
    assert paper(tmp_path, "--tables", "perplexity", *arguments) == 1
    assert reported in capsys.readouterr().err


def test_zeros_are_counted_on_the_weights():
    from tables.pruned_models import counted_sparsity

    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    result = prune(model, [torch.randn(4, 8)], PruningConfig(pattern="2:4"))
    assert counted_sparsity(model, result) == 0.5
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(MaskError, match=r"100\.00% of the pruned weights are zero"):
        counted_sparsity(model, result)


def test_products_are_timed_dense_and_sparse_where_the_shape_fits(monkeypatch):
    from tables import speedup

    monkeypatch.setattr(speedup, "pack", lambda weight, backend: weight)  # there is no such GPU here
    cpu = torch.device("cpu")
    found = speedup.times((32, 64), cpu, torch.float32, "cutlass", tokens=4)
    assert found["dense_ms"] > 0
    assert found["sparse_ms"] > 0
    assert speedup.times((32, 48), cpu, torch.float32, "cutlass", tokens=4) == {"shape": (32, 48)}
    shapes = speedup.linear_shapes(load_causal_lm("tiny-llama"))
    assert shapes["down_proj"] == (192, 512)
    assert "lm_head" not in shapes
