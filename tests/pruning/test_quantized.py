"""Layers that bitsandbytes holds in 4 and 8 bits: read, pruned, written, put back, saved and loaded."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsefit.errors import MaskError
from sparsefit.pruning.quantized import (
    awaits_quantization,
    dequantized,
    forget_cached,
    is_quantized,
    matrix_shape,
    plain_layout,
    restore,
    snapshot,
    stored_matrix,
    write_quantized,
    zero_outside,
)

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized layers to prune")

KINDS = ["int8", "nf4", "fp4", "nf4-nested", "fp4-nested"]
FOUR_BIT = [kind for kind in KINDS if kind != "int8"]
# Odd widths, blocks that span rows, a number of weights that is odd, and the plain case.
SHAPES = [(7, 9), (33, 130), (64, 65), (48, 32), (16, 96), (2, 1), (32, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """bitsandbytes compiles its fallback for odd widths: seconds for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_layer(
    kind: str, shape: tuple[int, int] = (64, 128), dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> nn.Module:
    """A quantized layer with random weights; for 4 bits, `blocksize` and `quant_storage` are settings."""
    rows, columns = shape
    if kind == "int8":
        layer: nn.Module = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    else:
        storage = settings.get("quant_storage", torch.uint8)
        layer = bnb.nn.Linear4bit(
            columns,
            rows,
            bias=False,
            quant_type=kind[:3],
            compress_statistics=kind.endswith("nested"),
            quant_storage=storage,
        )
        layer.weight.blocksize = settings.get("blocksize", 64)
    # Rows of very different size, so that a wrong scale shows.
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(-2, 2, rows).exp().unsqueeze(1)
    layer.weight.data = (torch.randn(shape, generator=generator) * sizes).to(dtype)
    return layer.to("cpu").eval()


def random_mask(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def held_bits(layer: nn.Module) -> list[Any]:
    """All that a layer computes with, to the bit."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return [layer.weight.data.tolist(), scales.tolist()]
    state = layer.weight.quant_state.as_dict()
    return [
        layer.weight.data.contiguous().view(torch.uint8).tolist(),
        {name: value.tolist() if isinstance(value, Tensor) else value for name, value in state.items()},
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zeroing_makes_exact_zeros_and_keeps_the_rest_to_the_bit(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = make_layer(kind, shape, dtype)
    parameter, dense, mask = layer.weight, dequantized(layer), random_mask(shape)
    zero_outside(layer, mask)
    assert layer.weight is parameter
    assert is_quantized(layer)
    assert matrix_shape(layer) == shape
    assert dequantized(layer).dtype == (torch.float32 if kind == "int8" else dtype)
    assert torch.equal(dequantized(layer), dense.masked_fill(~mask, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_writing_keeps_zeros_exact_and_is_quantization_of_the_matrix(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer, other = make_layer(kind, shape, dtype), make_layer(kind, shape, dtype, seed=5)
    mask = random_mask(shape)
    mask[0] = False  # a row, and with it whole blocks, without weights
    matrix = dequantized(other).masked_fill(~mask, -0.0)
    parameter = layer.weight
    write_quantized(layer, matrix)
    written = dequantized(layer)
    assert layer.weight is parameter
    assert not written[~mask].any()
    reference = make_layer(kind, shape, dtype)  # quantized by the library itself
    reference.weight = type(reference.weight)(matrix, **settings_of(reference))
    reference.to("cpu")
    assert torch.equal(dequantized(reference)[mask], written[mask])


def settings_of(layer: nn.Module) -> dict[str, Any]:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "has_fp16_weights")
    return {"requires_grad": False} | {n: getattr(layer.weight, n) for n in names if hasattr(layer.weight, n)}


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_of_the_code_book_are_read_as_they_are(kind: str, blocksize: int) -> None:
    shape = (16, 96)  # at 64 and 256 the blocks span rows
    book = bnb.functional.get_4bit_type(kind, device="cpu")
    order = torch.arange(16 * 96) * 7 % 16  # each block holds every code, its largest magnitude among them
    scales = 2.0 ** (torch.arange(16 * 96) // blocksize % 5)
    matrix = (book[order] * scales).view(shape)
    layer = make_layer(kind, shape, blocksize=blocksize)
    write_quantized(layer, matrix)
    assert layer.weight.quant_state.blocksize == blocksize
    torch.testing.assert_close(dequantized(layer), matrix, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_reading_agrees_with_the_library(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, (96, 256), dtype)
    library = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantized(layer), library)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_packed_data_of_a_float_dtype_is_not_taken_for_weights(storage: torch.dtype) -> None:
    layer = make_layer("nf4", quant_storage=storage)
    plain = make_layer("nf4")
    assert layer.weight.dtype == storage
    assert is_quantized(layer)
    assert torch.equal(dequantized(layer), dequantized(plain))
    shape, mask, dense = layer.weight.shape, random_mask((64, 128)), dequantized(plain)
    write_quantized(layer, 2 * dense)
    assert torch.equal(dequantized(layer), 2 * dense)
    zero_outside(layer, mask)
    assert torch.equal(dequantized(layer), 2 * dense.masked_fill(~mask, 0))
    assert (layer.weight.dtype, layer.weight.shape) == (storage, shape)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_uses_the_pruned_weights(kind: str, mode: str) -> None:
    layer, inputs = make_layer(kind), torch.randn(5, 128)
    layer.train(mode == "train")
    with torch.no_grad(), plain_layout(layer):
        layer(inputs)  # 8-bit layers move their scales out of the parameter now
        for change in (
            lambda: zero_outside(layer, random_mask((64, 128))),
            lambda: write_quantized(layer, dequantized(layer) * 3),
        ):
            change()
            expected = nn.functional.linear(inputs, dequantized(layer).float())
            actual = layer(inputs)
            assert (actual - expected).norm() < (0.02 if kind == "int8" else 1e-3) * expected.norm()
            assert not dequantized(layer)[~random_mask((64, 128))].any()


@pytest.mark.parametrize("kind", KINDS)
def test_snapshot_and_restore_to_the_bit(kind: str) -> None:
    layer, inputs = make_layer(kind), torch.randn(5, 128)
    with torch.no_grad(), plain_layout(layer):
        before, output = held_bits(layer), layer(inputs)
        for _ in range(2):
            taken = snapshot(layer)
            zero_outside(layer, random_mask((64, 128)))
            layer(inputs)
            write_quantized(layer, -dequantized(layer))
            assert held_bits(layer) != before
            restore(layer, taken)
            restore(layer, taken)  # an interrupted one is done again
            assert held_bits(layer) == before
            assert torch.equal(layer(inputs), output)


def test_a_snapshot_does_not_follow_writes_in_place() -> None:
    layer = make_layer("int8")
    before, taken = held_bits(layer), snapshot(layer)
    layer.load_state_dict(make_layer("int8", seed=3).state_dict())
    assert held_bits(layer) != before
    restore(layer, taken)
    assert held_bits(layer) == before


@pytest.mark.parametrize("shape", [(7, 9), (64, 128)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_are_read_from_the_file(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    layer, mask = make_layer(kind, shape, torch.bfloat16), random_mask(shape)
    zero_outside(layer, mask)
    model = nn.ModuleDict({"first": layer, "second": nn.Linear(3, 2)})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    matrix = stored_matrix(tensors, "first.weight")
    assert torch.equal(matrix, dequantized(layer))
    assert not matrix[~mask].any()
    assert torch.equal(stored_matrix(tensors, "second.weight"), model["second"].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_layer_is_the_pruned_one(kind: str) -> None:
    layer, loaded = make_layer(kind), make_layer(kind, seed=3)
    with torch.no_grad(), plain_layout(nn.ModuleList([layer, loaded])):
        layer(torch.randn(2, 128))
        zero_outside(layer, random_mask((64, 128)))
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        if kind == "int8":
            loaded.load_state_dict(state)
        else:
            data = state.pop("weight")
            statistics = {name.removeprefix("weight."): value for name, value in state.items()}
            loaded.weight = bnb.nn.Params4bit.from_prequantized(data, statistics, device="cpu", module=loaded)
        assert torch.equal(dequantized(loaded), dequantized(layer))
        zero_outside(loaded, ~random_mask((64, 128)))
        assert not dequantized(loaded).any()
        assert not loaded(torch.randn(2, 128)).any()


def test_layers_that_are_not_quantized() -> None:
    for layer in (nn.Linear(4, 4), nn.Conv1d(3, 3, 1), nn.Embedding(3, 3)):
        assert not is_quantized(layer)
        assert not awaits_quantization(layer)
    for waiting in (bnb.nn.Linear4bit(64, 64), bnb.nn.LinearNF4(64, 64), eight_bit(has_fp16_weights=False)):
        assert awaits_quantization(waiting)
        assert not is_quantized(waiting)
        waiting.to("cpu")
        assert is_quantized(waiting)
        assert not awaits_quantization(waiting)
    assert not awaits_quantization(eight_bit(has_fp16_weights=True))
    assert not is_quantized(eight_bit(has_fp16_weights=True))


def eight_bit(has_fp16_weights: bool) -> nn.Module:
    return bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=has_fp16_weights)


def test_float_weights_of_an_8bit_layer_are_quantized_anew() -> None:
    layer, inputs = eight_bit(has_fp16_weights=True).eval().requires_grad_(False), torch.randn(3, 64)
    with torch.no_grad():
        layer(inputs)
        layer.weight.zero_()
        forget_cached(layer)
        assert torch.equal(layer(inputs), layer.bias.expand(3, 64))


def test_a_layer_whose_scales_the_parameter_lost() -> None:
    layer = make_layer("nf4")
    dense = dequantized(layer)
    layer.weight.quant_state = None  # what sharding strategies do; the layer has a second reference
    assert is_quantized(layer)
    zero_outside(layer, random_mask((64, 128)))
    assert torch.equal(dequantized(layer), dense.masked_fill(~random_mask((64, 128)), 0))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_shapes_that_do_not_fit_are_refused(kind: str) -> None:
    layer = make_layer(kind)
    before = held_bits(layer)
    for act in (zero_outside, write_quantized):
        with pytest.raises(MaskError, match=r"\(128, 64\) does not fit .*\(64, 128\)"):
            act(layer, torch.ones(128, 64, dtype=torch.bool))
    assert held_bits(layer) == before


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_quantizing_works_without_bitsandbytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(kind)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    taken, dense = snapshot(layer), dequantized(layer)
    zero_outside(layer, random_mask((64, 128)))
    restore(layer, taken)
    assert torch.equal(dequantized(layer), dense)
    assert torch.equal(stored_matrix({f"x.{k}": v for k, v in layer.state_dict().items()}, "x.weight"), dense)
    with pytest.raises(ImportError):
        write_quantized(layer, dense)


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
    bits, taken = held_bits(layer), snapshot(layer)
    zero_outside(layer, mask)
    assert torch.equal(dequantized(layer), dense.masked_fill(~mask, 0))
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, dequantized(layer)))
    assert layer.weight.dtype == storage
    saved = {f"x.{name}": value for name, value in layer.state_dict().items()}
    assert torch.equal(stored_matrix(saved, "x.weight"), dequantized(layer))
    restore(layer, taken)
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
        taken = {path: snapshot(layer) for path, layer in layers.items()}
        for layer in layers.values():
            zero_outside(layer, random_mask(matrix_shape(layer)))
        pruned = model(tokens).logits
        model.save_pretrained(tmp_path)
        for path, layer in layers.items():
            restore(layer, taken[path])
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
