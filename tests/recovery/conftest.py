"""Fixtures for the tests of recovery."""

from __future__ import annotations

import pytest
import torch

from sparsefit import prune
from sparsefit.recovery.export import export_base


@pytest.fixture
def run(tmp_path, tiny_model):
    """A run folder with a Llama at 50% in bfloat16 and its masks."""
    model = tiny_model("llama").to(torch.bfloat16)
    masks = prune(model, [{"input_ids": torch.arange(3, 15).view(2, 6)}]).masks
    export_base(model, masks, tmp_path / "run/base").save(tmp_path / "run/masks.safetensors")
    return tmp_path / "run"
