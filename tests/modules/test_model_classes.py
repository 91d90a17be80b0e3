from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from sparsefit.errors import ConfigError
from sparsefit.modules import CausalLMModule
from sparsefit.modules.loading import load_causal_lm, load_model, load_with_new_head
from sparsefit.recovery.model_kinds import kind_of

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def saved(folder, name="BertForSequenceClassification", **settings):
    torch.manual_seed(0)
    model = getattr(transformers, name)(BertConfig(**SIZES | settings))
    model.save_pretrained(folder)
    return model


def rename(folder, architectures):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))


@pytest.mark.parametrize(
    "name",
    ["BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM", "BertForQuestionAnswering"],
)
def test_a_model_is_of_the_class_that_its_configuration_names(tmp_path, name):
    model = saved(tmp_path, name)
    loaded = load_model(str(tmp_path))
    assert type(loaded).__name__ == name
    assert not loaded.training
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_a_classifier_is_no_language_model(tmp_path):
    saved(tmp_path, num_labels=3)
    for load in (load_causal_lm, CausalLMModule):
        with pytest.raises(ConfigError, match=r"BertForSequenceClassification.*no causal.*SequenceClassifierModule"):
            load(str(tmp_path))
    with pytest.raises(ConfigError, match="no token classifier"):
        load_model(str(tmp_path), kind="token_classification")


def test_a_body_without_a_head_is_no_language_model(tmp_path):
    saved(tmp_path, "BertModel")
    with pytest.raises(ConfigError, match=r"holds a BertModel, .*without a head, which would be random"):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["BertForNothing"], "names BertForNothing, which transformers .* does not have"),
        (["pipeline"], "names pipeline, which transformers .* does not have"),
        (None, "names no class"),
        (["BertForMaskedLM"], r"no weights for cls\.predictions.*would be random"),
        (["BertModel"], r"does not have: classifier\.bias, classifier\.weight\. They would be dropped"),
    ],
)
def test_a_configuration_that_does_not_fit_its_weights(tmp_path, architectures, message):
    saved(tmp_path)
    rename(tmp_path, architectures)
    with pytest.raises(ConfigError, match=message):
        load_model(str(tmp_path))


def test_weights_that_are_missing(tmp_path):
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for bert\.encoder\.layer\.1\.output\.dense\.weight"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no part of its head"):
        load_with_new_head(str(tmp_path), "sequence_classification", 5)


def test_buffers_that_older_releases_saved_with_the_weights_are_ignored(tmp_path):
    model = saved(tmp_path, "BertForMaskedLM")
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.embeddings.position_ids"] = torch.arange(32)[None]
    weights["cls.seq_relationship.weight"] = torch.ones(2, 16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())


def test_unused_weights_go_where_that_is_wanted(tmp_path):
    model = saved(tmp_path)
    rename(tmp_path, ["BertModel"])
    body = load_model(str(tmp_path), allow_unused=True).state_dict()
    expected = model.bert.state_dict()
    assert body.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in body.items())


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("BertModel", ["classifier"]),
        ("BertForMaskedLM", ["bert.pooler.dense", "classifier"]),
        ("BertForSequenceClassification", ["classifier"]),
    ],
)
def test_a_new_head_on_a_pretrained_body(tmp_path, name, new):
    old = saved(tmp_path, name).state_dict()
    model, modules = load_with_new_head(str(tmp_path), "sequence_classification", 5)
    assert modules == new
    assert model.config.num_labels == 5
    assert model.classifier.out_features == 5
    body = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(tuple(new))}
    before = {key if key.startswith("bert.") else f"bert.{key}": tensor for key, tensor in old.items()}
    assert body
    assert all(torch.equal(tensor, before[key]) for key, tensor in body.items())


def test_a_head_that_is_there_is_not_replaced_by_one_of_its_size(tmp_path):
    saved(tmp_path, num_labels=3)
    with pytest.raises(ConfigError, match="has a trained head of 3 classes already"):
        load_with_new_head(str(tmp_path), "sequence_classification", 3)


def test_kinds_of_transformers_classes():
    kinds = {
        "LlamaForCausalLM": "causal_lm",
        "GPT2LMHeadModel": "causal_lm",
        "T5ForConditionalGeneration": "seq2seq",
        "WhisperForConditionalGeneration": "seq2seq",
        "DeiTForImageClassificationWithTeacher": "image_classification",
        "BertForTokenClassification": "token_classification",
        "BertModel": "encoder",
        "BertForMaskedLM": None,
    }
    assert {name: kind_of(name) for name in kinds} == kinds
