"""`sparsefit plan`: what it counts is what a run then has, and what will not fit is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefit.modules.loading import load_tokenizer

BLOCKS = 5


@pytest.fixture
def deep(tmp_path, recipe):
    """The recipe with a model of more blocks than a miniature has."""
    tokenizer = load_tokenizer("tiny-llama")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    recipe["model"]["init_args"]["model"] = str(tmp_path / "deep")
    return recipe, model


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, " ".join(text.split()))
    assert found, f"{pattern} is not in {text}"
    return float(found[1].replace(",", ""))


def test_a_plan_tells_what_the_run_then_takes(sparsefit, deep, tmp_path):
    recipe, model = deep
    recipe["reconstruction"] = {"passes": 1, "batch_size": 2}
    recipe["trainer"]["max_steps"] = 4
    status, told, errors = sparsefit("plan", recipe=recipe)
    assert status == 0, errors
    run = Path(recipe["run"]["folder"])
    assert not run.exists()
    assert number(r"Plan: ([\d,]+) weights", told) == pytest.approx(
        sum(p.numel() for p in model.parameters()), rel=0.02
    )
    blocks = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    assert number(r"weights, ([\d,]+) of them", told) == blocks
    assert number(r"training: ([\d,]+) steps", told) == 4
    assert "which max_steps ends" in told
    for stage in ("evaluation", "calibration and pruning", "reconstruction", "training", "export"):
        assert re.search(rf"{stage}.*? s +[<\d.]+ +\d+%", told), stage
    assert "DOES NOT FIT" not in told
    assert sparsefit("fit", recipe=recipe)[0] == 0
    files = sum(file.stat().st_size for file in run.rglob("*") if file.is_file() and "logs" not in file.parts)
    unit = {"KiB": 2**10, "MiB": 2**20}[re.search(r"files: [\d.,]+ (\w+)", " ".join(told.split()))[1]]
    assert number(r"files: ([\d.,]+)", told) * unit == pytest.approx(files, rel=0.1)


def test_a_budget_that_buys_no_step_is_told(sparsefit, recipe):
    recipe["budget"] = {"gpu_hours": 1e-5}
    status, told, _ = sparsefit("plan", recipe=recipe)
    assert status == 0
    assert "NOTHING IS TRAINED" in told
    assert "raise budget.gpu_hours" in told


def test_a_gpu_by_its_data_sheet(sparsefit, deep):
    recipe, model = deep
    status, told, errors = sparsefit("plan", "--gpu", "h100", recipe=recipe)
    assert status == 0, errors
    assert "nothing is measured" in told
    assert number(r"Plan: ([\d,]+) weights", told) == pytest.approx(
        sum(p.numel() for p in model.parameters()), rel=0.02
    )
    status, _, errors = sparsefit("plan", "--gpu", "abacus", recipe=recipe)
    assert status == 2
    assert "'abacus': use one of" in errors


def test_what_fails_in_the_miniature_is_one_sentence(sparsefit, recipe):
    recipe["model"]["init_args"]["adapter"]["target_modules"] = ["no_such_layer"]
    status, _, errors = sparsefit("plan", recipe=recipe)
    assert status == 2
    assert "no_such_layer" in errors
    assert "Traceback" not in errors
