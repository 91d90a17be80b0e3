"""A run that trains or measures nothing says so, and is not called finished."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefit.modules.loading import load_tokenizer

pytestmark = pytest.mark.slow


def one_document(recipe, folder):
    recipe["data"]["init_args"]["train_source"] = str(folder / "train/0.txt")
    return "no text of train_source"


def blank_test_text(recipe, folder):
    (folder / "blank.txt").write_text("\n \n" * 200)
    recipe["data"]["init_args"]["test_source"] = str(folder / "blank.txt")
    return "the text of test_source"


def blank_wikitext(recipe, folder):
    (folder / "blank.txt").write_text("\n \n" * 200)
    recipe["data"]["init_args"]["test_source"] = f"wikitext:{folder / 'blank.txt'}"
    return "the text of test_source"


def no_batches(recipe, folder):
    recipe["trainer"]["limit_train_batches"] = 0
    return "limit_train_batches is 0"


def less_than_a_window(recipe, folder):
    (folder / "short.txt").write_text("a few words")
    settings = recipe["data"]["init_args"]
    settings |= {"calibration_source": settings["train_source"], "train_source": str(folder / "short.txt")}
    return "the training data gave no batch"


@pytest.mark.parametrize(
    "change", [one_document, blank_test_text, blank_wikitext, no_batches, less_than_a_window], ids=lambda c: c.__name__
)
def test_a_fit_with_nothing_to_train_or_measure_fails(sparsefit, recipe, tmp_path, change):
    words = change(recipe, tmp_path)
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert (status, words in errors, "Traceback" in errors) == (2, True, False)
    report = tmp_path / "run/report.json"
    assert not report.exists() or json.loads(report.read_text())["status"] == "failed"


def test_pruning_alone_needs_no_text_to_train_on(sparsefit, recipe, tmp_path):
    one_document(recipe, tmp_path)
    assert sparsefit("prune", recipe=recipe)[0] == 0


def test_a_warm_up_that_outlasts_the_run_is_reported(sparsefit, recipe):
    recipe["budget"]["warmup_steps"] = 4
    with pytest.warns(UserWarning, match="warmup_steps is 4 and training ends after 3 steps"):
        assert sparsefit("fit", recipe=recipe)[0] == 0


def test_tokens_without_an_embedding_are_reported(sparsefit, recipe, tmp_path):
    tokenizer = load_tokenizer("tiny-llama")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) - 5, **sizes)).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    recipe["model"]["init_args"]["model"] = recipe["data"]["init_args"]["tokenizer"] = str(tmp_path / "small")
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert (status, "that the model has no embedding for" in errors) == (2, True)
    status, _, errors = sparsefit("evaluate", tmp_path / "small", "--perplexity", tmp_path / "train/0.txt")
    assert (status, "that the model has no embedding for" in errors) == (2, True)
