"""Random scores to select from, with ties and zeros."""

from __future__ import annotations

import numpy as np
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["random", "signed", "tied", "zeros"]


def make_scores(kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if kind == "random":
        values = values.abs()
    elif kind == "tied":
        values = values.mul(1.5).round()
    elif kind == "zeros":  # 0.0 and -0.0 are equal: neither goes before the other
        values = torch.where(values > 0, 0.0, -0.0) * (torch.rand(shape, generator=generator) < 0.9)
    return values.to(dtype)


def as_numpy(scores: torch.Tensor) -> np.ndarray:
    return scores.double().numpy()
