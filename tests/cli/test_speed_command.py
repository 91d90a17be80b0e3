"""`sparsefit speed`: what is measured, what is said of it, and what cannot run here."""

from __future__ import annotations

import gc
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from sparsefit import PruningConfig, prune
from sparsefit.errors import ConfigError
from sparsefit.modules.loading import load_model
from sparsefit.recovery.export import export_base
from sparsefit.serving.decoders import TorchDecoder, check_cache
from sparsefit.serving.dense_twin import dense_twin, zeros_as_masks
from sparsefit.serving.export_libraries import missing_for
from sparsefit.serving.exported_graphs import GraphDecoder, export_graph
from sparsefit.serving.runtimes import RUNTIMES
from sparsefit.serving.speed_comparison import Row, verdict
from sparsefit.serving.timing import Speed, measure

pytestmark = pytest.mark.slow

QUICK = ("--prompt", 8, "--tokens", 2, "--repeats", 2, "--batch-sizes", 1, 3)


@pytest.fixture
def run(tmp_path):
    """A run folder with a small Llama at 2:4 in float32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    masks = prune(model, [{"input_ids": torch.arange(3, 15).view(2, 6)}], PruningConfig(pattern="2:4")).masks
    export_base(model, masks, tmp_path / "run/base").save(tmp_path / "run/masks.safetensors")
    return tmp_path / "run"


def test_every_runtime_is_measured_or_says_why_not(sparsefit, run, tmp_path):
    arguments = ("--runtimes", "torch,torch-csr,torch-2:4", "--json", tmp_path / "found.json", "--device", "cpu")
    status, output, errors = sparsefit("speed", run, *QUICK, *arguments)
    assert status == 0, errors
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["runtime"], row["batch"]) for row in found["rows"]] == [
        (name, batch) for name in ("torch", "torch-csr") for batch in (1, 3)
    ]
    for row in found["rows"]:
        assert row["logits_difference"] < 1e-4
        for phase in ("prefill", "decode"):
            speeds = row[phase]
            assert len(speeds["dense"]["repeats"]) == len(speeds["pruned"]["repeats"]) == 2
            assert min(speeds["dense"]["repeats"] + speeds["pruned"]["repeats"]) > 0
    assert "float32" in found["not_run"]["torch-2:4"]
    assert "torch-2:4: not run" in output
    assert found["verdict"] in output


def test_memory_is_that_of_the_format_that_computes(sparsefit, run, tmp_path):
    sparsefit("speed", run, *QUICK, "--runtimes", "torch,torch-csr", "--json", tmp_path / "found.json")
    memory = {row["runtime"]: row["weight_bytes"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert memory["torch"]["dense"] == memory["torch"]["pruned"] == memory["torch-csr"]["dense"]
    # Each of half the weights has a column number of four bytes, so sparse rows of float32 save nothing.
    assert memory["torch-csr"]["pruned"] >= memory["torch"]["pruned"]


@pytest.mark.parametrize(("runtime", "kind"), [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_other_runtimes_compute_the_same_model(sparsefit, run, tmp_path, runtime, kind):
    if why := missing_for(kind):
        pytest.skip(why)
    arguments = ("--runtimes", runtime, "--json", tmp_path / "found.json", "--device", "cpu")
    status, _, errors = sparsefit("speed", run, *QUICK, *arguments)
    assert status == 0, errors
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    assert max(row["logits_difference"] for row in rows) < 1e-3


def test_signals_are_handled_once_models_of_openvino_are_gone(run):
    # OpenVINO gives the thread a stack for signal handlers: on one that is gone, a signal ends the process.
    if why := missing_for("openvino"):
        pytest.skip(why)
    graph = export_graph(load_model(str(run / "base")), "openvino")
    first, second = GraphDecoder(graph, threads=1), GraphDecoder(graph, threads=1)
    del first
    gc.collect()
    del second
    gc.collect()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_model_folder_without_masks_is_taken_by_its_zeros(sparsefit, run):
    (run / "masks.safetensors").unlink()
    status, output, errors = sparsefit("speed", run / "base", *QUICK, "--runtimes", "torch-csr")
    assert (status, "torch-csr" in output) == (0, True), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runtimes", "vllm"), "there is no 'vllm'"),
        (("--tokens", 0), "--tokens is 0"),
        (("--processor-time", "--threads", 2), "give --threads 1"),
        (("--batch-sizes", 1, -1), "--batch-sizes[1] is -1"),
        (("--device", "abacus"), "'abacus' cannot be used"),
    ],
)
def test_wrong_input_is_reported(sparsefit, run, arguments, message):
    status, _, errors = sparsefit("speed", run, *arguments)
    assert (status, message in errors) == (2, True), errors


def test_a_dense_model_has_nothing_to_gain(sparsefit, model):
    status, _, errors = sparsefit("speed", model, *QUICK)
    assert (status, "has no zeros" in errors) == (2, True), errors


def test_the_twin_differs_in_nothing_but_its_zeros():
    layer = nn.Linear(64, 64)
    layer.weight.data[:, ::2] = 0
    twin = dense_twin(layer)
    assert torch.equal(twin.weight[:, 1::2], layer.weight[:, 1::2])
    assert bool((twin.weight != 0).all())
    assert bool((layer.weight[:, ::2] == 0).all())


class Clocked:
    """A decoder that takes given seconds of a simulated clock."""

    weight_bytes = 1
    note = ""

    def __init__(self, clock, start, step):
        self.clock, self.seconds = clock, (start, step)

    def start(self, ids):
        self.clock[0] += self.seconds[0]
        return torch.zeros(*ids.shape, 5)

    def step(self, token):
        self.clock[0] += self.seconds[1]
        return torch.zeros(*token.shape, 5)


def test_tokens_a_second_are_those_of_a_clock():
    clock = [0.0]
    decoders = {"dense": Clocked(clock, 2.0, 0.5), "pruned": Clocked(clock, 1.0, 0.25)}
    found = measure(decoders, torch.zeros(3, 10, dtype=torch.long), 4, 2, clock=lambda: clock[0])
    assert found["dense"]["prefill"].repeats == (15.0, 15.0)
    assert found["dense"]["decode"].repeats == (6.0, 6.0)
    assert found["pruned"]["prefill"].median == 30.0
    assert found["pruned"]["decode"].spread == (12.0, 12.0)


def row(pruned, size=100):
    dense = {phase: Speed((10.0,) * 4) for phase in ("prefill", "decode")}
    return Row("torch-2:4", 1, 100, size, dense, dense | {"decode": Speed(pruned)}, 0.0)


@pytest.mark.parametrize(
    ("pruned", "size", "said"),
    [
        ((10.1, 10.0, 10.3, 10.0), 100, "No gain on this machine"),
        ((20.0, 9.0, 8.0, 9.0), 100, "No gain on this machine"),  # one lucky repeat
        (
            (13.0, 13.1, 12.9, 13.0),
            100,
            "faster (at best 1.30 times: torch-2:4, decode at batch 1) and not smaller",
        ),
        ((9.0,) * 4, 60, "not faster (at best 1.00 times) and smaller in memory (0.60 of"),
        (
            (13.0, 13.1, 12.9, 13.0),
            60,
            "faster (at best 1.30 times: torch-2:4, decode at batch 1) and smaller in memory",
        ),
    ],
)
def test_the_sentence_is_honest(pruned, size, said):
    assert said in verdict([row(pruned, size)])


def test_without_a_runtime_nothing_is_said_of_speed():
    assert "nothing was measured" in verdict([])


def replaced(monkeypatch, prepare):
    monkeypatch.setitem(RUNTIMES, "torch-csr", replace(RUNTIMES["torch-csr"], prepare=prepare))


def test_a_runtime_that_fails_is_named_and_the_others_are_measured(sparsefit, run, monkeypatch):
    def fail(model, masks):
        raise RuntimeError("CUDA out of memory\nmore")

    replaced(monkeypatch, fail)
    status, output, errors = sparsefit("speed", run, *QUICK, "--runtimes", "torch-csr,torch", "--device", "cpu")
    assert status == 0, errors
    assert "torch-csr: not run, CUDA out of memory" in output
    assert "With fewer than 4 repeats, no gain in speed is claimed" in output


def test_a_runtime_that_computes_something_else_is_not_measured(sparsefit, run, monkeypatch):
    def spoil(model, masks):
        model.lm_head.weight.data.mul_(1.5)
        return TorchDecoder(model)

    replaced(monkeypatch, spoil)
    _, output, _ = sparsefit("speed", run, *QUICK, "--runtimes", "torch-csr", "--device", "cpu")
    assert "torch-csr: not run, torch-csr does not compute what the model does" in output


def test_what_cannot_be_run_token_by_token_is_reported(sparsefit, run):
    status, _, errors = sparsefit("speed", run, "--prompt", 5000, "--tokens", 2)
    assert (status, "positions" in errors) == (2, True), errors
    with pytest.raises(ConfigError, match="takes no past_key_values"):
        check_cache(MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1)))


def test_zeros_of_transposed_layers_are_found():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
    masks = prune(model, config=PruningConfig(score="magnitude")).masks
    assert zeros_as_masks(model).digest() == masks.digest()


def test_the_filled_weights_have_both_signs():
    layer = nn.Linear(64, 64)
    layer.weight.data[:, ::2] = 0
    assert 0.45 < float((dense_twin(layer).weight[:, ::2] < 0).float().mean()) < 0.55
