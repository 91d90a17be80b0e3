"""`sparsefit push`, by the hub's own client, to a hub on this machine."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from hub_stand_in import hub
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from sparsefit import push_to_hub
from sparsefit.errors import ConfigError
from sparsefit.files import write_sums
from sparsefit.pruning import MaskSet
from sparsefit.recovery.inspection import inspect_folder
from sparsefit.reporting import formats
from sparsefit.reporting.report import read_json, write_json


@pytest.fixture
def server(monkeypatch):
    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield running


@pytest.fixture
def run(sparsefit, recipe, tmp_path):
    """A finished run with base, adapter and merged model."""
    recipe["model"]["init_args"]["adapter"]["form"] = "masked_lora"
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_is_pushed_with_its_card(sparsefit, run, server, tmp_path):
    status, output, errors = sparsefit("push", run, "me/sparse", "--private")
    assert status == 0, errors
    assert output == f"pushed to {server.address}/me/sparse"
    assert server.tokens == {"Bearer hf_secret"}
    repository = server.repositories["me/sparse"]
    assert repository["private"] is True

    # What comes down is the model, exactly as sparse.
    for name, content in repository["files"].items():
        place = tmp_path / "downloaded" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    downloaded = inspect_folder(tmp_path / "downloaded")
    assert downloaded.masks is not None
    assert not downloaded.broken
    assert downloaded.sparsity == 0.5
    assert (tmp_path / "downloaded/config.json").read_bytes() == (run / "model/config.json").read_bytes()

    card = ModelCard(repository["files"]["README.md"].decode())
    report = read_json(run / "report.json")
    assert card.data.library_name == "transformers"
    assert {"sparsefit", "wanda"} <= set(card.data.tags)
    reported = re.search(r"^\| perplexity \|(.*)\|$", card.text, re.M)[1].split("|")
    stages = ("dense", "pruned", "recovered", "merged")
    assert [cell.strip() for cell in reported[:4]] == [
        formats.metric("perplexity", report["perplexity"][stage]) for stage in stages
    ]
    assert f"| {report['sparsity']['zeros']:,} | 50.00% |" in card.text
    assert formats.hours(report["gpu_hours"]["total"]) in card.text
    assert report["command"] in card.text
    assert "`merged` in the table of quality" in card.text

    # The other parts: the base is measured as it was pruned, the adapter names no path of this machine.
    assert push_to_hub(run, "me/base", what="base") == f"{server.address}/me/base"
    assert sparsefit("push", run, "me/adapter", "--what", "adapter")[0] == 0
    base, adapter = (server.repositories[f"me/{part}"]["files"] for part in ("base", "adapter"))
    assert base["model.safetensors"] == (run / "base/model.safetensors").read_bytes()
    assert b"`pruned` in the table" in base["README.md"]
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] is None
    assert ModelCard(adapter["README.md"].decode()).data.library_name == "peft"
    assert not any(str(tmp_path).encode() in file for name, file in adapter.items() if name != "README.md")

    # The card of the folder itself tells the same.
    assert reported == re.search(r"^\| perplexity \|(.*)\|$", (run / "README.md").read_text(), re.M)[1].split("|")
    refused(sparsefit, run, server)


def refused(sparsefit, run, server):
    """What is not whole, or cannot be sent, is not sent; what is refused first is what is wrong with the run."""

    def push(*arguments):
        server.repositories.clear()
        status, _, errors = sparsefit("push", run, "me/sparse", *arguments)
        assert status == 2
        assert not server.repositories
        return errors

    server.refuses = 403
    assert "was not pushed to 'me/sparse'" in push()
    server.refuses = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "the Hugging Face hub cannot be used" in push()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(run / "no-token"))
        assert "HubError: there is no token" in push()
    with pytest.raises(ConfigError, match="the choices are model, base and adapter"):
        push_to_hub(run, "me/sparse", what="logs")

    whole = run.with_name("whole")
    shutil.copytree(run, whole)
    weights = run / "model/model.safetensors"

    tensors = load_file(weights)
    name = next(iter(MaskSet.load(run / "masks.safetensors").parameters))
    save_file({**tensors, name: torch.ones_like(tensors[name])}, weights, {"format": "pt"})
    assert "not what its SHA256SUMS says" in push()
    write_sums(run / "model")  # as if it had been written so
    assert "MaskError" in push()
    save_file({**tensors, "model.norm.weight": torch.full((16,), torch.nan)}, weights, {"format": "pt"})
    write_sums(run / "model")
    assert "DivergenceError" in push()
    shutil.rmtree(run / "model")
    assert "the run in" in (errors := push())
    assert "push the adapter or the base" in errors

    shutil.rmtree(run)
    shutil.copytree(whole, run)
    write_json(read_json(run / "report.json") | {"status": "interrupted"}, run / "report.json", seal=True)
    assert "not finished" in push()
    (run / "report.json").unlink()
    assert "there is no finished run" in push()


def test_the_model_that_a_card_names(sparsefit, recipe, tmp_path):
    """A folder is no model of the hub, whatever its path looks like."""
    (tmp_path / "owner").mkdir()
    shutil.copytree(recipe["model"]["init_args"]["model"], tmp_path / "owner/model")
    recipe["model"]["init_args"]["model"] = recipe["data"]["init_args"]["tokenizer"] = "owner/model"
    assert sparsefit("prune", recipe=recipe)[0] == 0
    text = (tmp_path / "run/README.md").read_text()
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "A pruned `model`." in text
