from __future__ import annotations

import re

import peft
import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers.pytorch_utils import Conv1D

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import MaskError
from sparsefit.recovery import semi_structured
from sparsefit.recovery.semi_structured import HALF, backend_of, is_two_of_four, to_semi_structured, why_dense

IDS = torch.arange(3, 51).view(4, 12)
CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
NEEDS_GPU = pytest.mark.skipif(not CAPABLE, reason="needs a GPU of compute capability 8.0 or newer")
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def masked(model, **settings):
    return prune(model, [{"input_ids": IDS}], PruningConfig(pattern="2:4", **settings)).masks


def cpu_pack(dense, backend):
    """A semi-structured tensor on the CPU, in the layout of CUTLASS: it can be unpacked, not multiplied."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    return torch.sparse.SparseSemiStructuredTensorCUTLASS(dense.shape, packed, meta, None, None, None)


@pytest.fixture
def pretended(monkeypatch):
    """A CPU that is taken for a GPU that CUTLASS runs on."""
    monkeypatch.setattr(semi_structured, "backend_of", lambda device: ("cutlass", ""))
    monkeypatch.setattr(semi_structured, "pack", cpu_pack)


@pytest.mark.parametrize("dtype", HALF)
def test_torch_packs_what_the_masks_keep(tiny_model, dtype):
    model = tiny_model("llama", **WIDE).to(dtype)
    for name in masked(model):
        weight = model.get_parameter(name).detach()
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.shape == (weight.shape[0], weight.shape[1] // 2)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), weight)
        assert packed.nbytes + meta.nbytes == weight.nbytes * 9 // 16


def test_torch_would_lose_float32_weights(tiny_model):
    """Why float32 stays dense."""
    model = tiny_model("llama", **WIDE)
    weight = model.get_parameter(next(iter(masked(model)))).detach()
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), weight)


@pytest.mark.parametrize("dtype", HALF)
def test_weights_are_replaced(tiny_model, pretended, dtype):
    model = tiny_model("llama", **WIDE).to(dtype)
    masks = masked(model, exclude=["down_proj"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = to_semi_structured(model, masks)
    assert report.converted == list(masks)
    assert report.dense == {}
    assert report.backends == {"cpu": "cutlass"}
    for name, parameter in model.named_parameters():
        is_packed = isinstance(parameter, torch.sparse.SparseSemiStructuredTensor)
        assert is_packed == (name in masks)
        assert torch.equal(parameter.to_dense() if is_packed else parameter, before[name])
        assert not (is_packed and parameter.requires_grad)


def test_a_shared_weight_is_shared_still(pretended):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).bfloat16()
    model[2].weight = model[0].weight
    masks = prune(model, [torch.randn(8, 64).bfloat16()], PruningConfig(pattern="2:4")).masks
    report = to_semi_structured(model, masks)
    assert report.converted == ["0.weight"]
    assert model[0].weight is model[2].weight
    assert isinstance(model[0].weight, torch.sparse.SparseSemiStructuredTensor)


def test_under_an_adapter(tiny_model, pretended):
    model = tiny_model("llama", **WIDE).half()
    masks = masked(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert to_semi_structured(model, masks).converted == list(masks)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer.weight, torch.sparse.SparseSemiStructuredTensor)
    assert not isinstance(layer.lora_A["default"].weight, torch.sparse.SparseSemiStructuredTensor)


def test_on_a_cpu_nothing_changes_and_every_weight_has_a_reason(tiny_model):
    model = tiny_model("llama", **WIDE).bfloat16()
    masks = masked(model)
    report = to_semi_structured(model, masks)
    assert report.converted == []
    assert set(report.dense) == set(masks)
    assert set(report.dense.values()) == {backend_of(torch.device("cpu"))[1]}
    assert "it is on the cpu: 2:4 tensors need a GPU" in backend_of(torch.device("cpu"))[1]
    masks.verify(model)


@pytest.mark.parametrize(
    ("capability", "built", "message"),
    [
        ((7, 5), True, r"compute capability 7\.5"),
        ((9, 0), False, "no backend of this torch works on the GPU .it has no cuSPARSELt"),
        ((9, 0), True, "cusparselt: architecture mismatch.$"),
        ((8, 6), False, "cutlass: architecture mismatch.$"),
        ((8, 0), True, "cusparselt: architecture mismatch; cutlass: architecture mismatch.$"),
    ],
)
def test_gpus_that_cannot(monkeypatch, capability, built, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: built)
    monkeypatch.setattr(semi_structured, "_try", lambda backend, device: "architecture mismatch")
    backend, why = backend_of(torch.device("cuda:0"))
    assert backend is None
    assert re.search(message, why)


@pytest.mark.parametrize(("failing", "chosen"), [((), "cusparselt"), (("cusparselt",), "cutlass")])
def test_the_backend_that_passes_its_trial(monkeypatch, failing, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(semi_structured, "_try", lambda backend, device: "no" if backend in failing else "")
    assert backend_of(torch.device("cuda:0")) == (chosen, "")


@pytest.mark.parametrize(
    ("mask", "fits"),
    [
        ([[1, 1, 0, 0, 0, 1, 0, 1]], True),
        ([[0, 0, 0, 0, 0, 1, 0, 0]], True),
        ([[1, 1, 1, 0, 0, 0, 0, 1]], False),
        ([[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1, 1, 0]], False),
        ([[1, 1, 0, 0, 0, 1]], False),
    ],
)
def test_what_is_two_of_four(mask, fits):
    assert is_two_of_four(torch.tensor(mask, dtype=torch.bool)) == fits


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(64, 64), "it is float32: convert the model"),
        (nn.Linear(64, 64).double(), "it is float64: convert the model"),
        (Conv1D(64, 64).half(), "its layer is a Conv1D"),
        (nn.Conv2d(64, 64, 1).half(), "its layer is a Conv2d"),
        (None, "not the weight of a layer of its own"),
        (nn.Linear(64, 64).half(), ""),
        (nn.Linear(64, 64, bias=False).bfloat16(), ""),
    ],
)
def test_layers_that_stay_dense(layer, message):
    masks = MaskSet()
    masks.add("layer.weight", torch.tensor([True, False, False, True]).tile(64, 16))
    why = why_dense("layer.weight", layer, masks)
    assert why.startswith(message)
    assert bool(why) == bool(message)


def test_other_reasons(tiny_model, pretended):
    model = tiny_model("mixtral").half()
    masks = masked(model)
    report = to_semi_structured(model, masks)
    assert report.converted == []
    experts = {why for name, why in report.dense.items() if "experts" in name}
    assert experts == {"one matrix of a stack of experts"}
    others = {why for name, why in report.dense.items() if "q_proj" in name}
    assert others == {"its shape is (32, 32): cutlass takes multiples of (32, 64)"}

    model = tiny_model("llama", **WIDE).half()
    masks = prune(model, [{"input_ids": IDS}]).masks
    assert set(to_semi_structured(model, masks).dense.values()) == {"its mask is not 2:4"}
    layer = nn.Linear(64, 64).half()
    layer.bias.data = layer.bias.data.float()
    masks = MaskSet()
    masks.add("weight", torch.tensor([True, False, False, True]).tile(64, 16))
    assert why_dense("weight", layer, masks) == "its bias has another dtype"


def test_a_weight_that_came_back_is_an_error_and_changes_nothing(tiny_model, pretended):
    model = tiny_model("llama", **WIDE).half()
    masks = masked(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight += 1
    with pytest.raises(MaskError, match=r"layers\.2\.mlp\.down_proj"):
        to_semi_structured(model, masks)
    assert not any(isinstance(p, torch.sparse.SparseSemiStructuredTensor) for p in model.parameters())


@NEEDS_GPU
@pytest.mark.parametrize("dtype", HALF)
def test_a_gpu_computes_the_same(tiny_model, dtype):
    model = tiny_model("llama", **WIDE).to("cuda", dtype)
    masks = masked(model)
    ids = IDS.cuda()
    with torch.inference_mode():
        expected = model(ids).logits.float()
        report = to_semi_structured(model, masks)
        logits = model(ids).logits.float()
    assert report.converted == list(masks)
    assert (logits - expected).norm() < 0.02 * expected.norm()
    for name in masks:
        weight = model.get_parameter(name)
        assert isinstance(weight, torch.sparse.SparseSemiStructuredTensor)


@NEEDS_GPU
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (256, 512)])
def test_a_gpu_multiplies_a_layer_right(shape, bias):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(shape[1], shape[0], bias=bias)).to("cuda", torch.bfloat16)
    inputs = torch.randn(3, 5, shape[1], device="cuda", dtype=torch.bfloat16)
    masks = prune(layer, [inputs], PruningConfig(pattern="2:4")).masks
    with torch.inference_mode():
        expected = layer(inputs).float()
        assert to_semi_structured(layer, masks).converted == ["0.weight"]
        assert (layer(inputs).float() - expected).norm() < 0.01 * expected.norm()
