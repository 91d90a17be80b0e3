"""The warning before a fit in a floating-point type that the processor is slow in."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from small_runs import QUIET, Classifier
from torch.utils.data import DataLoader, TensorDataset

from sparsefit.callbacks import WandaPruning, slow_precision
from sparsefit.callbacks.slow_precision import slowdown


def said_of(precision: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """What a fit on the CPU says of its precision."""
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = DataLoader(TensorDataset(inputs, torch.arange(16) % 3), batch_size=8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = Trainer(**QUIET, max_steps=0, precision=precision, callbacks=[WandaPruning(0.5)])
        trainer.fit(Classifier().to(dtype), data)
    return [str(warning.message) for warning in seen if "This processor" in str(warning.message)]


@pytest.mark.parametrize(
    ("precision", "dtype", "name"),
    [
        ("bf16-mixed", torch.float32, "bfloat16"),
        ("bf16-true", torch.float32, "bfloat16"),
        ("32-true", torch.bfloat16, "bfloat16"),
        ("16-true", torch.float32, "float16"),
        ("32-true", torch.float32, None),
        ("64-true", torch.float32, None),
    ],
)
def test_a_processor_without_instructions_for_it_is_reported_before_the_fit(monkeypatch, precision, dtype, name):
    monkeypatch.setattr(slow_precision, "slowdown", lambda dtype: 20.0)
    reported = (
        f"This processor needs 20 times as long for a product of matrices in {name} as in float32: train in float32"
    )
    assert [line.startswith(reported) for line in said_of(precision, dtype)] == [True] * (name is not None)


def test_a_processor_with_instructions_for_it_is_not(monkeypatch):
    monkeypatch.setattr(slow_precision, "slowdown", lambda dtype: 1.5)
    assert said_of("bf16-mixed") == []


def test_it_is_measured_on_this_processor():
    assert slowdown(torch.float32) == 1.0
    assert slowdown(torch.bfloat16) > 0.01
    assert slowdown(torch.bfloat16) == slowdown(torch.bfloat16)  # once
