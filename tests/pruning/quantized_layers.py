"""Small layers of bitsandbytes with random weights, and their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized layers to prune")

KINDS = ["int8", "nf4", "fp4", "nf4-nested", "fp4-nested"]
FOUR_BIT = [kind for kind in KINDS if kind != "int8"]
# Odd widths, blocks that span rows, a number of weights that is odd, and the plain case.
SHAPES = [(7, 9), (33, 130), (64, 65), (48, 32), (16, 96), (2, 1), (32, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    """All values that a layer computes with, bit for bit."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return [layer.weight.data.tolist(), scales.tolist()]
    state = layer.weight.quant_state.as_dict()
    return [
        layer.weight.data.contiguous().view(torch.uint8).tolist(),
        {name: value.tolist() if isinstance(value, Tensor) else value for name, value in state.items()},
    ]
