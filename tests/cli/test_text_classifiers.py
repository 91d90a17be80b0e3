from __future__ import annotations

import csv
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from text_recipes import rows, save_model, text_recipe, tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparsefit.modules.loading import load_tokenizer
from sparsefit.pruning import MaskSet

pytestmark = pytest.mark.slow

CLASSIFIERS = {
    "sequence_classification": ("BertForSequenceClassification", "SequenceClassifierModule"),
    "token_classification": ("BertForTokenClassification", "TokenClassifierModule"),
}
AUTO = {
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
}
CLASSES = {"sequence_classification": 2, "token_classification": 3}
BATCH = {"input_ids": torch.tensor([[1, 4, 5, 16, 7, 2]])}


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def report_of(run):
    return json.loads((run / "report.json").read_text())


def recipe_of(folder, task, **settings):
    name, module = CLASSIFIERS[task]
    model = save_model(folder / "model", name, num_labels=CLASSES[task])
    return model, text_recipe(folder, folder / "model", task, module, **settings)


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_pruning_a_classifier_gives_a_classifier(sparsefit, tmp_path, task):
    dense, recipe = recipe_of(tmp_path, task)
    status, _, errors = sparsefit("prune", recipe=recipe)
    assert status == 0, errors
    base = tmp_path / "run/base"
    pruned = AUTO[task].from_pretrained(base)
    assert type(pruned) is type(dense)
    masks = MaskSet.load(tmp_path / "run/masks.safetensors")
    masks.apply(dense)
    assert torch.equal(logits(pruned), logits(dense))
    weights = load_file(base / "model.safetensors")
    zeros = sum(int((weights[name] == 0).sum()) for name in masks.parameters)
    assert zeros == sum(weights[name].numel() for name in masks.parameters) // 2
    assert not any("classifier" in name for name in masks)
    assert AutoTokenizer.from_pretrained(base)("good dog").input_ids == tokenizer()("good dog").input_ids
    report = report_of(tmp_path / "run")
    assert report["sparsity"]["total"] == 0.5
    assert report["metrics"] == {"accuracy": "higher", "f1": "higher"}
    assert {*report["accuracy"]} == {*report["f1"]} == {"dense", "pruned"}


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_the_report_measures_what_can_be_counted_on_the_saved_model(sparsefit, tmp_path, task):
    _, recipe = recipe_of(tmp_path, task)
    recipe["trainer"]["max_steps"] = 120
    assert sparsefit("fit", recipe=recipe)[0] == 0
    model, words = AUTO[task].from_pretrained(tmp_path / "run/model").eval(), tokenizer()
    right = []
    names = sorted({"sequence_classification": {"good", "bad"}, "token_classification": {"good", "bad", "other"}}[task])
    for row in rows(task, 16, seed=2):
        text = row["text"] if isinstance(row["text"], str) else " ".join(row["text"])
        with torch.no_grad():
            found = model(**words(text, return_tensors="pt")).logits[0].argmax(-1)
        labels = [row["label"]] if isinstance(row["label"], str) else row["label"]
        numbers = torch.tensor([names.index(label) for label in labels])
        right.append((found.flatten() if found.ndim == 0 else found[1:-1]) == numbers)
    report = report_of(tmp_path / "run")
    assert report["accuracy"]["recovered"] == pytest.approx(torch.cat(right).float().mean().item())
    assert report["accuracy"]["recovered"] > report["accuracy"]["pruned"]
    MaskSet.load(tmp_path / "run/masks.safetensors").verify(model)


@pytest.mark.parametrize("task", CLASSIFIERS)
@pytest.mark.parametrize("form", ["lora", "masked_lora", "hira"])
def test_a_new_head_is_trained_and_saved_with_the_adapter(sparsefit, tmp_path, task, form):
    save_model(tmp_path / "model", "BertModel")
    adapter = {"form": form, "r": 2, "dropout": 0.0, "target_modules": ["query", "value"]}
    recipe = text_recipe(
        tmp_path,
        tmp_path / "model",
        task,
        CLASSIFIERS[task][1],
        adapter=adapter,
        num_labels=CLASSES[task],
        new_head=True,
    )
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    run = tmp_path / "run"
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == {"sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}[task]
    base = AUTO[task].from_pretrained(run / "base")
    assert base.config.label2id["good"] == 1
    random_head = base.classifier.weight.detach().clone()
    adapter_weights = load_file(run / "adapter/adapter_model.safetensors")
    head = next(tensor for name, tensor in adapter_weights.items() if name.endswith("classifier.weight"))
    assert not torch.equal(head, random_head)
    status, output, errors = sparsefit("merge", run, "--output", tmp_path / "out", "--reapply-masks")
    assert status == 0, errors
    merged = AUTO[task].from_pretrained(tmp_path / "out")
    assert torch.equal(merged.classifier.weight, head)
    MaskSet.load(run / "masks.safetensors").verify(merged)
    assert "accuracy: " in output
    report = report_of(run)
    assert f"{report['accuracy']['recovered']:.4f} with a separate adapter" in output
    if form != "masked_lora":  # whose masks plain PEFT does not know
        apart = peft.PeftModel.from_pretrained(base, run / "adapter")
        if form == "hira":
            torch.testing.assert_close(logits(apart), logits(merged), rtol=1e-4, atol=1e-5)


def test_merging_needs_no_tokenizer(sparsefit, tmp_path):
    adapter = {"form": "masked_lora", "r": 2, "target_modules": "all-linear"}
    _, recipe = recipe_of(tmp_path, "sequence_classification", adapter=adapter)
    assert sparsefit("fit", recipe=recipe)[0] == 0
    for file in (*(tmp_path / "run/base").glob("token*"), tmp_path / "run/base/SHA256SUMS"):
        file.unlink()
    status, _, errors = sparsefit("merge", tmp_path / "run", "--output", tmp_path / "out")
    assert status == 0, errors
    assert not list((tmp_path / "out").glob("token*"))
    MaskSet.load(tmp_path / "out/masks.safetensors").verify(
        AUTO["sequence_classification"].from_pretrained(tmp_path / "out")
    )


def test_a_dense_classifier_teaches_its_pruned_self(sparsefit, tmp_path):
    _, recipe = recipe_of(
        tmp_path,
        "token_classification",
        distill={"weight": 0.5},
        adapter={"form": "full", "target_modules": "all-linear"},
    )
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    MaskSet.load(tmp_path / "run/masks.safetensors").verify(load_file(tmp_path / "run/model/model.safetensors"))
    (metrics,) = (tmp_path / "run/logs").rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    assert any(row.get("train_divergence") and float(row["train_divergence"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"num_labels": 5}, {}, "has 2 classes, and num_labels is 5"),
        ({"new_head": True}, {}, "needs num_labels"),
        ({"new_head": True, "num_labels": 3, "distill": {"weight": 0.5}}, {}, "has nothing to teach"),
        ({"adapter": {"target_modules": ["query"], "modules_to_save": ["clasifier"]}}, {}, "did you mean classifier"),
        ({}, {"label": "lable"}, "no column 'lable'"),
        ({}, {"class_names": ["good", "awful"]}, "'bad', which is none of the classes"),
        ({}, {"train_source": "nowhere.jsonl"}, "names no labelled text"),
    ],
)
def test_settings_that_cannot_work_are_reported(sparsefit, tmp_path, settings, data, message):
    _, recipe = recipe_of(tmp_path, "sequence_classification", data=data, **settings)
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 2
    assert message in errors


def test_a_classifier_as_a_language_model_is_refused(sparsefit, tmp_path):
    _, recipe = recipe_of(tmp_path, "sequence_classification")
    recipe["model"]["class_path"] = "sparsefit.modules.CausalLMModule"
    status, _, errors = sparsefit("prune", recipe=recipe)
    assert (status, "take SequenceClassifierModule" in errors.replace("Take", "take")) == (2, True)
    assert not (tmp_path / "run/base").exists()


def test_a_decoder_becomes_a_classifier(sparsefit, tmp_path):
    words = load_tokenizer("tiny-llama")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    adapter = {"form": "masked_lora", "r": 2, "target_modules": "all-linear"}
    settings = {"new_head": True, "num_labels": 2, "adapter": adapter}
    recipe = text_recipe(
        tmp_path, tmp_path / "model", "sequence_classification", "SequenceClassifierModule", **settings
    )
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    MaskSet.load(tmp_path / "run/masks.safetensors").verify(model)
    base = load_file(tmp_path / "run/base/model.safetensors")
    assert not torch.equal(model.score.weight, base["score.weight"])
