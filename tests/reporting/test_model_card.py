"""A run's model card: it says what the report says, and nothing else."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from sparsefit.reporting.card import model_card


def test_its_front_matter_and_lines(report):
    named = report | {"model": {"name": "owner/model", "hub": True}}
    card = ModelCard(model_card(named, "base", "transformers"))
    assert card.data.base_model == "owner/model"
    assert card.data.library_name == "transformers"
    assert {"sparsefit", "pruning", "wanda"} == set(card.data.tags)
    assert "`pruned` in the table of quality" in card.text
    assert "| perplexity | 18.25 | 26.75 | 20.50 |" in card.text
    assert "128 samples, 32,768 tokens" in card.text
    local = model_card(report | {"model": {"name": "/home/me/model", "hub": False}})
    assert "A pruned `model`." in local
    assert "base_model" not in local
    assert "/home/me" not in local


LINES = {
    "perplexity": "## Quality",
    "sparsity": "## Sparsity",
    "pruning": "- calibration",
    "training": "- training",
    "command": "## Command",
    "versions": "Made with",
}


@pytest.mark.parametrize("missing", LINES)
def test_what_the_report_does_not_hold_is_left_out(report, missing):
    whole = model_card(report)
    text = model_card({key: value for key, value in report.items() if key != missing})
    assert LINES[missing] in whole
    assert LINES[missing] not in text
    assert "None" not in text
    assert set(text.splitlines()) <= set(whole.splitlines())


def test_a_run_that_has_not_finished_says_so(report):
    assert "has not finished (interrupted)" in model_card(report | {"status": "interrupted"})
    assert "has not finished (unknown)" in model_card({})
