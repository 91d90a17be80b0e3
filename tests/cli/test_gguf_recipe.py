"""A recipe whose model is a GGUF file: what it writes are plain folders."""

from __future__ import annotations

import json

import pytest
from gguf_files import tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsefit.data import TextFilesDataModule
from sparsefit.evaluation.perplexity import perplexity
from sparsefit.modules.loading import load_tokenizer

pytestmark = pytest.mark.slow


def test_a_gguf_file_in_a_recipe(sparsefit, recipe, tmp_path):
    tokenizer = load_tokenizer("tiny-llama")
    file = write_gguf(tiny_llama(len(tokenizer)), tokenizer, tmp_path / "tiny.Q4_1.gguf", quantized=True)
    adapter = {"form": "masked_lora", "r": 2, "dropout": 0.0, "target_modules": "all-linear"}
    recipe["model"]["init_args"] |= {"model": str(file), "adapter": adapter, "distill": {"weight": 0.5}}
    recipe["data"]["init_args"]["tokenizer"] = str(file)
    recipe["control"] = True
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    run = tmp_path / "run"
    figures = json.loads((run / "report.json").read_text())["perplexity"]
    assert set(figures) == {"dense", "pruned", "recovered", "merged", "control"}

    for folder, stage in (("base", "pruned"), ("model", "merged")):
        config = json.loads((run / folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert "quantization_config" not in config
        tokens = AutoTokenizer.from_pretrained(run / folder)
        settings = {"sequence_length": 16, "batch_size": 2, "test_windows": 6}
        data = TextFilesDataModule(tokens, train_source=None, test_source=str(tmp_path / "test"), **settings)
        measured = perplexity(AutoModelForCausalLM.from_pretrained(run / folder), data.test_dataloader())
        assert measured == figures[stage]

    status, output, _ = sparsefit("inspect", run)
    assert (status, "masks hold" in output) == (0, True)
    status, output, errors = sparsefit("merge", run, "--output", tmp_path / "merged")
    assert status == 0, errors
    assert f"{figures['merged']:.4f} merged (+0.0000)" in output
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    written = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert all(float((again[name] - written[name]).abs().max()) == 0.0 for name in written)
