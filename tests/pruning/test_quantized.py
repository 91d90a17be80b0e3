"""Layers that bitsandbytes holds in 4 and 8 bits: read, pruned, written, put back, saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_layers import DTYPES, FOUR_BIT, KINDS, SHAPES, bnb, held_bits, make_layer, random_mask
from safetensors.torch import load_file, save_file
from torch import nn

from sparsefit.errors import MaskError
from sparsefit.pruning.layers.quantized import matrices
from sparsefit.quantized import (
    awaits_quantization,
    dequantized,
    is_quantized,
    matrix_shape,
    plain_layout,
    stored_matrix,
    write_quantized,
    zero_outside,
)

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zeroing_makes_exact_zeros_and_keeps_the_rest_bit_for_bit(
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
def test_snapshot_and_restore_bit_for_bit(kind: str) -> None:
    layer, inputs = make_layer(kind), torch.randn(5, 128)
    with torch.no_grad(), plain_layout(layer):
        before, output = held_bits(layer), layer(inputs)
        for _ in range(2):
            put_back = matrices(layer)[0].snapshot()
            zero_outside(layer, random_mask((64, 128)))
            layer(inputs)
            write_quantized(layer, -dequantized(layer))
            assert held_bits(layer) != before
            put_back()
            put_back()  # an interrupted one is done again
            assert held_bits(layer) == before
            assert torch.equal(layer(inputs), output)


def test_a_snapshot_does_not_follow_writes_in_place() -> None:
    layer = make_layer("int8")
    before, put_back = held_bits(layer), matrices(layer)[0].snapshot()
    layer.load_state_dict(make_layer("int8", seed=3).state_dict())
    assert held_bits(layer) != before
    put_back()
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
        (weight,) = matrices(layer)
        weight.set_values(torch.zeros(64, 64))
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
    put_back, dense = matrices(layer)[0].snapshot(), dequantized(layer)
    zero_outside(layer, random_mask((64, 128)))
    put_back()
    assert torch.equal(dequantized(layer), dense)
    assert torch.equal(stored_matrix({f"x.{k}": v for k, v in layer.state_dict().items()}, "x.weight"), dense)
    with pytest.raises(ImportError):
        write_quantized(layer, dense)
