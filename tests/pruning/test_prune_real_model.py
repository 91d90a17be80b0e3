"""A pretrained model on real texts: what the scores are for."""

from __future__ import annotations

import copy
import json
import math
from itertools import islice

import pytest
import torch

from sparsefit import PruningConfig, prune

pytestmark = pytest.mark.slow

LENGTH = 256


@pytest.fixture(scope="module")
def stories(shared_data):
    """The model, calibration windows (64, 256) and evaluation windows (24, 256) from other stories."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "tinystories656K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def windows(name: str, count: int) -> torch.Tensor:
        with (shared_data / "tinystories" / name).open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in islice(file, 3 * count)]
        ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[0, : count * LENGTH]
        return ids.view(count, LENGTH)

    return model, windows("train_sample.jsonl", 64), windows("val.jsonl", 24)


@torch.no_grad()
def perplexity(model, windows: torch.Tensor) -> float:
    losses = [model(input_ids=batch, labels=batch).loss for batch in windows.split(16)]
    return math.exp(torch.stack(losses).mean())


def pruned(stories, **settings) -> float:
    dense, calibration, evaluation = stories
    model = copy.deepcopy(dense)
    result = prune(model, [{"input_ids": calibration}], PruningConfig(**settings))
    result.masks.verify(model)
    assert result.notes == []
    assert result.masks.sparsity == pytest.approx(float(result.config.sparsity), abs=0.01)  # floor of each row
    return perplexity(model, evaluation)


def test_wanda_beats_magnitude_and_both_cost_something(stories):
    dense = perplexity(stories[0], stories[2])
    half = {score: pruned(stories, score=score) for score in ("wanda", "magnitude")}
    assert dense < half["wanda"] < half["magnitude"]
    assert pruned(stories, sparsity=0.0) == dense
    assert dense < pruned(stories, sparsity=0.2) < half["wanda"] < pruned(stories, sparsity=0.7)
    assert half["wanda"] < pruned(stories, pattern="4:8") < pruned(stories, pattern="2:4")


@pytest.mark.parametrize("selection", [{}, {"pattern": "2:4"}], ids=["50%", "2:4"])
def test_swaps_and_updates_win_back_what_wanda_loses(stories, selection):
    wanda = pruned(stories, **selection)
    swapped = pruned(stories, swaps=10, **selection)
    sparsegpt = pruned(stories, score="sparsegpt", reconstruction="iterative", **selection)
    best = pruned(stories, swaps=10, reconstruction="least_squares", **selection)
    assert perplexity(stories[0], stories[2]) < best < sparsegpt < swapped < wanda


def test_blocks_with_outliers_keep_more(stories):
    assert pruned(stories, sparsity=0.7, allocation="owl") < pruned(stories, sparsity=0.7, allocation="uniform")


def test_matrices_that_change_the_predictions_keep_more(stories):
    by = {name: pruned(stories, allocation=name) for name in ("uniform", "owl", "fisher")}
    assert by["fisher"] < by["owl"] < by["uniform"]
