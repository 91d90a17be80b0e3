"""Recipes of sequence-to-sequence models and of embeddings."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from text_recipes import rows, save_model, text_recipe, tokenizer
from transformers import AutoModel, T5ForConditionalGeneration

from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapter_files import load_adapter

pytestmark = pytest.mark.slow


def report_of(run):
    return json.loads((run / "report.json").read_text())


def zeros_of(folder, masks):
    weights = load_file(folder / "model.safetensors")
    return sum(int((weights[name] == 0).sum()) for name in masks.parameters)


def size_of(folder, masks):
    return sum(load_file(folder / "model.safetensors")[name].numel() for name in masks.parameters)


def t5_recipe(folder, **settings):
    model = save_model(folder / "model", "T5ForConditionalGeneration")
    return model, text_recipe(folder, folder / "model", "seq2seq", "Seq2SeqModule", **settings)


@torch.no_grad()
def perplexity_of(model, part=2):
    """Text by text, in the plainest way."""
    words, total, count = tokenizer(), 0.0, 0
    for row in rows("seq2seq", 16, seed=part):
        labels = words(row["label"], return_tensors="pt").input_ids
        total += model.eval()(**words(row["text"], return_tensors="pt"), labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    return torch.tensor(total / count).exp().item()


@pytest.mark.parametrize("command", ["prune", "fit"])
def test_a_t5_stays_one(sparsefit, tmp_path, command):
    dense, recipe = t5_recipe(tmp_path, generated_tokens=4, learning_rate=1e-2)
    status, _, errors = sparsefit(command, recipe=recipe)
    assert status == 0, errors
    run = tmp_path / "run"
    report, masks = report_of(run), MaskSet.load(run / "masks.safetensors")
    assert report["perplexity"]["dense"] == pytest.approx(perplexity_of(dense), rel=1e-4)
    base = T5ForConditionalGeneration.from_pretrained(run / "base")
    assert report["perplexity"]["pruned"] == pytest.approx(perplexity_of(base), rel=1e-4)
    assert zeros_of(run / "base", masks) == size_of(run / "base", masks) // 2
    assert set(report["metrics"]) == {"perplexity", "token_accuracy", "word_error_rate"}
    if command == "fit":
        model = T5ForConditionalGeneration.from_pretrained(run / "model")
        masks.verify(model)
        assert report["perplexity"]["recovered"] == pytest.approx(perplexity_of(model), rel=1e-4)
        assert report["perplexity"]["recovered"] < report["perplexity"]["pruned"]


def test_a_t5_with_adapters_and_its_dense_teacher(sparsefit, tmp_path):
    adapter = {"form": "masked_lora", "r": 2, "dropout": 0.0, "target_modules": ["q", "v"]}
    _, recipe = t5_recipe(tmp_path, adapter=adapter, distill={"weight": 0.5})
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    run = tmp_path / "run"
    assert json.loads((run / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    masks = MaskSet.load(run / "masks.safetensors")
    apart = load_adapter(T5ForConditionalGeneration.from_pretrained(run / "base"), run / "adapter", masks)
    report = report_of(run)
    assert report["perplexity"]["recovered"] == pytest.approx(perplexity_of(apart), rel=1e-4)
    status, output, errors = sparsefit("merge", run, "--output", tmp_path / "out")
    assert status == 0, errors
    reported = re.search(r" perplexity: ([0-9.]+) with a separate adapter, ([0-9.]+) merged", output).groups()
    assert [float(value) for value in reported] == pytest.approx([report["perplexity"]["recovered"]] * 2, rel=1e-4)
    masks.verify(T5ForConditionalGeneration.from_pretrained(tmp_path / "out"))


def embedding_recipe(folder, name="BertModel", **settings):
    model = save_model(folder / "model", name, initializer_range=0.3)
    data = {"text_pair": "other", "score_range": [0, 5]}
    return model, text_recipe(folder, folder / "model", "pairs", "EmbeddingModule", data=data, **settings)


@torch.no_grad()
def cosines_of(model):
    """Text by text, without padding."""
    words, found = tokenizer(), []
    for row in rows("pairs", 16, seed=2):
        one, other = (
            model.eval()(**words(row[key], return_tensors="pt")).last_hidden_state.mean(1) for key in ("text", "other")
        )
        found.append(torch.cosine_similarity(one, other).item())
    return torch.tensor(found), torch.tensor([row["label"] for row in rows("pairs", 16, seed=2)])


def pearson_of(model):
    return torch.corrcoef(torch.stack(cosines_of(model)))[0, 1].item()


@pytest.mark.parametrize("adapter", [None, {"form": "hira", "r": 2, "target_modules": ["query", "value"]}])
def test_embeddings_are_trained_on_pairs(sparsefit, tmp_path, adapter):
    dense, recipe = embedding_recipe(tmp_path, adapter=adapter, learning_rate=3e-3)
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    run = tmp_path / "run"
    report, masks = report_of(run), MaskSet.load(run / "masks.safetensors")
    assert report["metrics"] == {"spearman": "higher", "pearson": "higher"}
    model = AutoModel.from_pretrained(run / "model")
    masks.verify(model)
    assert zeros_of(run / "model", masks) == size_of(run / "model", masks) // 2
    for stage, there in (("dense", dense), ("pruned", AutoModel.from_pretrained(run / "base")), ("recovered", model)):
        assert report["pearson"][stage] == pytest.approx(pearson_of(there), abs=1e-3)


def test_the_dense_embeddings_alone_teach(sparsefit, tmp_path):
    dense, recipe = embedding_recipe(tmp_path, distill={"weight": 1.0}, learning_rate=3e-3)
    recipe["trainer"]["max_steps"] = 40
    assert sparsefit("fit", recipe=recipe)[0] == 0

    @torch.no_grad()
    def away(folder):
        text = tokenizer()("quick good fox over", return_tensors="pt")
        found = AutoModel.from_pretrained(folder).eval()(**text).last_hidden_state.mean(1)
        return 1 - torch.cosine_similarity(found, dense(**text).last_hidden_state.mean(1)).item()

    assert away(tmp_path / "run/model") < 0.5 * away(tmp_path / "run/base")


def test_a_head_is_dropped_where_that_is_wanted(sparsefit, tmp_path):
    _, recipe = embedding_recipe(tmp_path, "BertForMaskedLM")
    status, _, errors = sparsefit("prune", recipe=recipe)
    assert (status, "BertForMaskedLM" in errors) == (2, True)
    recipe["model"]["init_args"]["drop_head"] = True
    status, _, errors = sparsefit("prune", recipe=recipe)
    assert status == 0, errors
    masks = MaskSet.load(tmp_path / "run/masks.safetensors")
    assert zeros_of(tmp_path / "run/base", masks) == size_of(tmp_path / "run/base", masks) // 2
