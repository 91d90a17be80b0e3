"""What several tests of this folder start from."""

from __future__ import annotations

import pytest
import torch
from compact_runs import pruned_run


@pytest.fixture
def run(tmp_path, tiny_model):
    """A run folder with a Llama at 50% in bfloat16 and its masks."""
    pruned_run(tiny_model("llama").to(torch.bfloat16), tmp_path / "run")
    return tmp_path / "run"
