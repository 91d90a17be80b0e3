"""Runs whose model is sharded (FSDP2), compared with runs on one device: recovery, the run folder and its uses."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import on_ranks
from safetensors.torch import load_file
from sharded_fits import sharded
from sharded_runs import Drifts, Own, Spoils, Writes, gpt2, llama, run
from small_runs import Net
from transformers import AutoModelForCausalLM

from sparsefit.callbacks import BlockwiseReconstruction, QuantizedBase
from sparsefit.cli import main
from sparsefit.errors import ConfigError, DivergenceError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapter_files import load_adapter

pytestmark = pytest.mark.slow

RUNS = {
    "masked_lora": lambda: llama("masked_lora"),
    "hira": lambda: llama("hira"),
    "lora": lambda: llama("lora"),
    "full": lambda: llama("full", train_norms=True),
    "taught": lambda: llama("masked_lora", weight=1.0),
    "taught_full": lambda: llama("full", weight=0.5),
    "gpt2": gpt2,
    "own": Own,
}
MERGED = ("masked_lora", "hira", "taught", "gpt2")
WHOLE = ("full", "taught_full", "own")


def runs(ranks, folder, names):
    more = {"full": [Drifts()]}
    return {name: run(ranks, folder / str(ranks) / name, RUNS[name](), *more.get(name, [])) for name in names}


def on_two(folder):
    found = runs(2, folder, RUNS)
    found["bfloat16"] = run(2, folder / "2/bfloat16", llama(dtype="bfloat16", train_norms=True))
    found["mixed"] = run(2, folder / "2/mixed", llama(), precision="bf16-mixed")
    return found | {"refused": {name: refused(folder / f"2/{name}", call) for name, call in REFUSED.items()}}


REFUSED = {
    "reconstruction": lambda folder: run(2, folder, llama(), BlockwiseReconstruction(passes=1)),
    "quantized": lambda folder: run(2, folder, llama(), QuantizedBase("int8")),
    "tensor parallel": lambda folder: run(
        2, folder, llama(), **(sharded(2) | {"strategy": ModelParallelStrategy(1, 2)})
    ),
    "biases": lambda folder: run(2, folder, gpt2("bfloat16")),
    "8 bits": lambda folder: run(2, folder, llama(optimizer="adamw_8bit")),
    "text": lambda folder: run(2, folder, llama(), Writes()),
    "diverged": lambda folder: run(2, folder, llama(), Spoils()),
}


def refused(folder, call):
    """What a fit that cannot be says, and what it leaves in its folder."""
    try:
        call(folder)
    except (ConfigError, DivergenceError) as error:
        return str(error), {path.name for path in folder.glob("*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def alone(folder):
    return runs(1, folder, RUNS)


@pytest.fixture(scope="module")
def two(folder):
    return on_ranks(2, on_two, folder)


@pytest.fixture(scope="module")
def four(folder):
    return on_ranks(4, runs, 4, folder, ["masked_lora"])


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["sparsefit", *map(str, arguments)])
    status = main()
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_come_to_the_weights_of_one(name, alone, two):
    expected, first, second = alone[name], two[0][name], two[1][name]
    assert first["step"] == second["step"] == 4
    assert first["digest"] == second["digest"] == expected["digest"]
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][key], weight, rtol=1e-4, atol=1e-5)
        assert torch.equal(first["weights"][key], second["weights"][key]), key


def test_four_ranks_do_too(alone, four):
    expected, last = alone["masked_lora"], four[3]["masked_lora"]
    assert last["digest"] == expected["digest"]
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(last["weights"][key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*RUNS, "bfloat16", "mixed"])
def test_no_weight_comes_back_and_nothing_is_left_whole(name, two):
    assert two[0][name]["watched"] == {"gradients": 0, "weights": 0, "whole": 0}


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_every_stage_are_those_of_one_device(name, alone, two):
    figure = "val_loss" if name == "own" else "perplexity"
    expected = alone[name]["report"][figure]
    stages = {"dense", "pruned", "recovered"} | ({"merged"} if name in MERGED else set())
    assert set(expected) == stages
    for rank in two:
        assert rank[name]["report"][figure] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("ranks", "name"), [*((2, name) for name in (*MERGED, *WHOLE)), (4, "masked_lora")])
def test_the_model_on_disk_has_the_zeros_of_its_masks(ranks, name, two, four, folder):
    place = folder / str(ranks) / name
    masks, state = MaskSet.load(place / "masks.safetensors"), load_file(place / "model/model.safetensors")
    for mask, matrix in masks.matrices_in(state):
        assert torch.equal(matrix != 0, masks[mask]), mask
    report = json.loads((place / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["sparsity"]["counted_on"] == "model/model.safetensors"
    assert report["sparsity"]["total"] == pytest.approx(masks.sparsity)
    assert report["gpu_hours"]["devices"] == ranks


@pytest.mark.parametrize("name", ["masked_lora", "hira", "lora"])
def test_what_is_read_from_the_folder_is_the_model_that_was_trained(name, two, folder):
    place = folder / "2" / name
    masks = MaskSet.load(place / "masks.safetensors")
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    read = load_adapter(base, place / "adapter", masks)
    trained = {key.removeprefix("model."): weight for key, weight in two[0][name]["weights"].items()}
    for key, weight in read.named_parameters():
        assert torch.equal(weight, trained[key]), key
    ids = torch.arange(3, 15)[None]
    if name != "lora":
        with torch.no_grad():
            apart, merged = (
                model.eval()(ids).logits for model in (read, AutoModelForCausalLM.from_pretrained(place / "model"))
            )
        torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
    else:
        assert not (place / "model").exists()


def test_the_trained_network_of_somebodys_own_is_on_disk(two, folder):
    state = load_file(folder / "2/own/model/model.safetensors")
    net = Net()
    net.load_state_dict({key.removeprefix("net."): weight for key, weight in state.items()})
    for key, weight in two[0]["own"]["weights"].items():
        assert torch.equal(state[key], weight), key


def test_one_process_inspects_and_merges_the_folder(two, folder, tmp_path, monkeypatch, capsys):
    place = tmp_path / "run"
    shutil.copytree(folder / "2/masked_lora", place)
    status, output = command(monkeypatch, capsys, "inspect", place)
    assert status == 0
    assert "49.72%" in output
    again = tmp_path / "again"
    status, _ = command(monkeypatch, capsys, "merge", place, "--output", again)
    assert status == 0
    merged, expected = load_file(again / "model.safetensors"), load_file(place / "model/model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)


def test_adapters_of_another_dtype_than_the_trained_norms_are_split_apart_from_them(two):
    weights = two[0]["bfloat16"]["weights"]
    assert {weight.dtype for key, weight in weights.items() if "lora_" in key} == {torch.float32}
    assert {weight.dtype for key, weight in weights.items() if "lora_" not in key} == {torch.bfloat16}
    assert two[0]["bfloat16"]["report"]["merge"]["lossless"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("reconstruction", "a block is tuned as a whole"),
        ("quantized", "take strategy ddp, or leave the base in floats"),
        ("tensor parallel", "data_parallel_size=2, tensor_parallel_size=1"),
        ("biases", "trains its bias in torch.bfloat16"),
        ("8 bits", "take the optimizer adamw"),
        ("text", "let one device (or strategy ddp) write it first"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks_before_anything_is_pruned(what, reason, two):
    for rank in two:
        message, written = rank["refused"][what]
        assert reason in message
        assert "base" not in written


def test_what_one_rank_finds_infinite_ends_all_and_what_was_written_stays(two, folder):
    for rank in two:
        message, written = rank["refused"]["diverged"]
        assert message.startswith("the gradient of optimizer step 1 is NaN or infinite")
        assert {"base", "masks.safetensors"} <= written
        assert "adapter" not in written
    assert json.loads((folder / "2/diverged/report.json").read_text())["status"] == "failed"
