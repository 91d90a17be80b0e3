"""Models with layers of bitsandbytes: their CPU layout, saved and loaded, adapted, pruned end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_layers import FOUR_BIT, held_bits, make_layer, random_mask
from safetensors.torch import load_file
from torch import nn

from sparsefit.pruning.layers.quantized import matrices
from sparsefit.quantized import (
    dequantized,
    is_quantized,
    matrix_shape,
    plain_layout,
    stored_matrix,
    write_quantized,
    zero_outside,
)

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def cpu_layout_layer() -> Callable[..., nn.Module]:
    def make(kind: str, **settings: Any) -> nn.Module:
        layer = make_layer(kind, **settings)
        if not layer.support_avx512bf16_for_cpu:
            pytest.skip("this CPU has no AVX-512 BF16: bitsandbytes does not rearrange the weights")
        with torch.no_grad():
            layer(torch.randn(2, 128))
        assert layer.weight.shape == (64, 64)
        return layer

    return make


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_weights_in_the_cpu_layout(kind: str, storage: torch.dtype, cpu_layout_layer: Callable[..., nn.Module]) -> None:
    stored = dequantized(make_layer(kind))
    layer = cpu_layout_layer(kind, quant_storage=storage)
    dense, mask, inputs = dequantized(layer), random_mask((64, 128)), torch.randn(2, 128)
    torch.testing.assert_close(dense, stored, rtol=2**-8, atol=0)  # its scales are rounded to bfloat16
    bits, put_back = held_bits(layer), matrices(layer)[0].snapshot()
    zero_outside(layer, mask)
    assert torch.equal(dequantized(layer), dense.masked_fill(~mask, 0))
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, dequantized(layer)))
    assert layer.weight.dtype == storage
    saved = {f"x.{name}": value for name, value in layer.state_dict().items()}
    assert torch.equal(stored_matrix(saved, "x.weight"), dequantized(layer))
    put_back()
    assert held_bits(layer) == bits
    assert layer.support_avx512bf16_for_cpu
    write_quantized(layer, stored)
    assert layer.weight.dtype == storage
    torch.testing.assert_close(dequantized(layer), stored, rtol=0.02, atol=0)


def test_the_layout_stays_plain_unless_an_error_comes() -> None:
    layer = make_layer("nf4")
    allowed, before = layer.support_avx512bf16_for_cpu, held_bits(layer)
    with pytest.raises(RuntimeError, match="on purpose"), plain_layout(layer):
        raise RuntimeError("on purpose")
    assert layer.support_avx512bf16_for_cpu == allowed
    with torch.no_grad(), plain_layout(layer):
        layer(torch.randn(2, 128))
    layer(torch.randn(2, 128))
    assert held_bits(layer) == before


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4-bfloat16-storage": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(folder)
    return folder


def load_quantized(folder: Path, name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**QUANTIZATIONS[name])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_transformers_model_saved_and_loaded(name: str, model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokens = load_quantized(model_folder, name), torch.arange(3, 19).view(2, 8)
    layers = {path: layer for path, layer in model.named_modules() if is_quantized(layer)}
    assert len(layers) == 2 * 7  # every linear layer of the blocks; the head stays in floats
    with torch.no_grad(), plain_layout(model):
        dense = model(tokens).logits
        put_back = {path: matrices(layer)[0].snapshot() for path, layer in layers.items()}
        for layer in layers.values():
            zero_outside(layer, random_mask(matrix_shape(layer)))
        pruned = model(tokens).logits
        model.save_pretrained(tmp_path)
        for put_back_layer in put_back.values():
            put_back_layer()
        assert torch.equal(model(tokens).logits, dense)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
        with plain_layout(reloaded):
            assert torch.equal(reloaded(tokens).logits, pruned)
    assert not torch.equal(dense, pruned)
    tensors = load_file(tmp_path / "model.safetensors")
    for path in layers:
        layer = reloaded.get_submodule(path)
        mask = random_mask(matrix_shape(layer))
        for matrix in (dequantized(layer), stored_matrix(tensors, f"{path}.weight")):
            assert matrix.shape == mask.shape
            assert not matrix[~mask].any()


@pytest.mark.parametrize("name", ["int8", "nf4-nested"])
def test_the_base_of_a_peft_model_stays_pruned_in_training(name: str, model_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_quantized(model_folder, name)
    plain = {id(layer) for layer in model.modules() if is_quantized(layer)}
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    layers = [layer for layer in model.modules() if is_quantized(layer)]
    assert {id(layer) for layer in layers} == plain  # the wrappers of PEFT are not taken for quantized layers
    with plain_layout(model):
        for layer in layers:
            zero_outside(layer, random_mask(matrix_shape(layer)))
        before = [copy.deepcopy(held_bits(layer)) for layer in layers]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        tokens = torch.arange(3, 19).view(2, 8)
        losses = []
        for _ in range(2):
            loss = model.train()(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] != losses[1]
        assert [held_bits(layer) for layer in layers] == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "nf4-nested"])
def test_prune_of_a_quantized_model_end_to_end(name: str, model_folder: Path) -> None:
    from sparsefit import PruningConfig, prune

    model, batches = load_quantized(model_folder, name), [{"input_ids": torch.arange(3, 35).view(2, 16)}]
    layers = {path: layer for path, layer in model.named_modules() if is_quantized(layer)}
    dense = {path: dequantized(layer) for path, layer in layers.items()}
    before = [held_bits(layer) for layer in layers.values()]

    def interrupted(done: int, total: int) -> None:
        if done == total:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        prune(model, batches, PruningConfig(pattern="2:4"), progress=interrupted)
    assert [held_bits(layer) for layer in layers.values()] == before

    result = prune(model, batches, PruningConfig(pattern="2:4"))
    result.masks.verify(model)
    assert set(result.masks) == {f"{path}.weight" for path in layers}
    for path, layer in layers.items():
        mask = result.masks[f"{path}.weight"]
        assert bool((mask.view(len(mask), -1, 4).sum(dim=2) == 2).all())
        assert torch.equal(dequantized(layer), dense[path].masked_fill(~mask, 0))
