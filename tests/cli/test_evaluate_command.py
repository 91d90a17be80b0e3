from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from sparsefit.evaluation import perplexity
from sparsefit.modules.loading import load_causal_lm, load_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards read the documentation of python aloud"
ITEMS = {
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
    "openbookqa": {"query": "Predators eat", "choices": ["lions", "bunnies"], "gold": 1},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tasks").mkdir()
    for task, item in ITEMS.items():
        (tmp_path / "tasks" / f"{task}.jsonl").write_text(3 * (json.dumps(item) + "\n"))
    return tmp_path / "tasks"


def needs_the_harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sparsefit[tasks]'")


def test_a_saved_model(sparsefit, model, folder, tmp_path):
    needs_the_harness()
    (tmp_path / "text.txt").write_text(5 * (WORDS + " "))
    text, output = ("--perplexity", "text.txt", "--length", 8), ("--output", "out/found.json")
    tasks = ("--tasks", "rte, openbookqa", "--tasks-folder", folder, "--limit", 2)
    status, reported, errors = sparsefit("evaluate", model, *tasks, *text, *output)
    assert (status, errors) == (0, "")
    found = json.loads((tmp_path / "out/found.json").read_text())

    network, tokenizer = load_causal_lm(str(model)), load_tokenizer(str(model))
    tokens = [*tokenizer((tmp_path / "text.txt").read_text())["input_ids"], tokenizer.eos_token_id]
    windows = torch.tensor(tokens[: len(tokens) // 8 * 8]).view(-1, 8)
    assert found["perplexity"]["value"] == pytest.approx(perplexity(network, [{"input_ids": windows}]), rel=1e-5)
    assert f"perplexity: {found['perplexity']['value']:.4f} on text.txt, {len(windows)} windows of 8 tokens" in reported

    assert list(found["tasks"]) == ["openbookqa", "rte"]  # JSON is sorted
    assert {name: task["items"] for name, task in found["tasks"].items()} == {"openbookqa": 2, "rte": 2}
    assert found["mean_acc"] == pytest.approx((found["tasks"]["rte"]["acc"] + found["tasks"]["openbookqa"]["acc"]) / 2)
    assert f"rte {found['tasks']['rte']['acc']:.2%} ± 0.00 - 2 1.0" in reported
    assert f"mean {found['mean_acc']:.2%}" in reported
    assert (found["dtype"], found["limit"], found["evaluated"]) == ("float32", 2, str(model))


@pytest.mark.slow
def test_of_a_run_the_recovered_model_is_measured(sparsefit, recipe, tmp_path):
    del recipe["data"]["init_args"]["test_windows"]  # the command measures all of a text
    assert sparsefit("fit", recipe=recipe)[0] == 0
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    text = ("--perplexity", tmp_path / "test", "--length", 16, "--batch-size", 2)
    status, reported, _ = sparsefit("evaluate", run, *text, "--output", "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    # LoRA does not merge without a loss, so the adapter stands apart
    assert status == 0
    assert f"{run / 'base'} with {run / 'adapter'}: float32 on" in reported
    assert found["perplexity"]["value"] == pytest.approx(report["perplexity"]["recovered"], rel=1e-5)

    _, reported, _ = sparsefit("evaluate", run / "base", *text, "--output", "found.json", "--dtype", "bfloat16")
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{run / 'base'}: bfloat16 on" in reported
    assert math.isclose(found["perplexity"]["value"], report["perplexity"]["pruned"], rel_tol=0.02)


def test_a_recipe_asks_for_tasks(sparsefit, recipe, folder, tmp_path):
    needs_the_harness()
    recipe["run"] |= {"tasks": ["rte", "openbookqa"], "tasks_folder": str(folder), "tasks_limit": 1}
    status, reported, _ = sparsefit("prune", recipe=recipe)
    assert status == 0
    found = json.loads((tmp_path / "run/report.json").read_text())
    assert list(found["tasks"]) == ["dense", "pruned"]
    assert found["tasks"]["pruned"]["rte"]["items"] == 1
    assert "openbookqa acc_norm" in reported


def test_a_recipe_with_tasks_needs_the_harness(sparsefit, recipe, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    recipe["run"] |= {"tasks": ["rte"], "tasks_folder": str(folder)}
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 2
    assert "pip install 'sparsefit[tasks]'" in errors
    assert not (tmp_path / "run/report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        ([], "there is nothing to evaluate: give --tasks NAMES, --perplexity FILE, or both"),
        (["--tasks-folder", "x", "--perplexity", "text.txt"], "name the tasks with --tasks"),
        (["--perplexity", "text.txt", "--batch-size", "0"], "batch_size is 0"),
        (["--perplexity", "nowhere.txt"], "nowhere.txt"),
        (["--perplexity", "text.txt", "--length", "1"], "a window needs at least 2 tokens"),
        (["--perplexity", "text.txt", "--length", "99"], "fewer than the 99 tokens of one window"),
        (["--perplexity", "text.txt", "--length", "4", "--device", "gpu"], "the device 'gpu' cannot be used"),
        (["--perplexity", "text.txt", "--dtype", "float23"], "unknown dtype 'float23'"),
    ],
)
def test_what_cannot_be_evaluated(sparsefit, model, tmp_path, arguments, reported):
    (tmp_path / "text.txt").write_text(WORDS)
    status, _, errors = sparsefit("evaluate", model, *arguments)
    assert status == 2
    assert reported in errors


def test_a_model_without_tokenizer(sparsefit, model, tmp_path):
    load_causal_lm(str(model)).save_pretrained(tmp_path / "bare")
    status, _, errors = sparsefit("evaluate", tmp_path / "bare", "--perplexity", "x.txt")
    assert status == 2
    assert "there is no tokenizer in the folder of the model" in errors


def test_a_run_that_wrote_no_model(sparsefit, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.json").write_text("{}")
    status, _, errors = sparsefit("evaluate", tmp_path / "run", "--perplexity", "x.txt")
    assert status == 2
    assert "has written no model" in errors
