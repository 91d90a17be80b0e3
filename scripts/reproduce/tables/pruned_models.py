"""Loads, prunes and checks models, and measures their perplexity."""

from __future__ import annotations

import gc
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn

from sparsefit import PruningConfig, PruningResult, prune
from sparsefit.data.causal_lm_data import TextDataModule
from sparsefit.errors import ConfigError, MaskError
from sparsefit.evaluation.perplexity import perplexity
from sparsefit.modules.loading import load_causal_lm, load_tokenizer
from tables.setup import Figures, Point, Settings, Setup

_TOKENS_AT_ONCE = 4096  # of the test text: the logits of a large vocabulary are the largest tensor of all
_TOLERANCE = 0.01  # sparsity that rounding in each comparison group may cost: 60% of a row of 64 is 59.4%


class PrunedModels:
    """Creates the dense and pruned models of points; holds one model at a time.

    Args:
        setup: the model, its texts and sizes.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.windows = lru_cache(maxsize=2)(self._windows)  # calibration windows by seed and number
        self.shared: dict[str, Any] = {}  # shared by the points of a table
        self._key: Any = None
        self._made: tuple[nn.Module, Figures] | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.setup.model)

    @cached_property
    def test(self) -> list[Any]:
        """Batches of the test text."""
        data = self.data(1, self.setup.seed)
        data.setup("test")
        return [{key: value.to(self.setup.device) for key, value in batch.items()} for batch in data.test_dataloader()]

    def data(self, samples: int, seed: int, **settings: Any) -> TextDataModule:
        """The model's texts as a data module with these settings."""
        setup = self.setup
        given = {
            "train_source": setup.train,
            "calibration_source": setup.calibration,
            "test_source": setup.test,
            "calibration": setup.drawing,
            "calibration_samples": samples,
            "calibration_batch_size": 1,
            "sequence_length": setup.length,
            "test_windows": setup.windows,
            "batch_size": max(1, _TOKENS_AT_ONCE // setup.length),
            "seed": seed,
        }
        return TextDataModule(self.tokenizer, **(given | settings))

    def dense(self) -> nn.Module:
        """Load the dense model on its device; frees the last model.

        Raises:
            ConfigError: if windows are longer than its context.
        """
        self.forget()
        model = load_causal_lm(self.setup.model, self.setup.dtype)
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and context < self.setup.length:
            raise ConfigError(f"the context of {self.setup.model} is {context} tokens: give --length {context} or less")
        return model.to(self.setup.device)

    def forget(self) -> None:
        """Free the last model."""
        self._made = None
        gc.collect()

    def model(self, point: Point) -> tuple[nn.Module, Figures]:
        """The pruned and checked model of a point, and figures of its pruning. The last model is kept."""
        key = {name: point.get(name) for name in ("pruning", "samples", "seed")}
        if self._made is None or key != self._key:
            model, account = self.dense(), {}
            if point["pruning"] is not None:
                # If no data is needed, one window shows which weights of the model are used.
                batches = self.windows(point.get("seed", self.setup.seed), point.get("samples", 1))
                account = pruned(model, point["pruning"], batches)
            self._made, self._key = (model, account), key
        return self._made

    def _windows(self, seed: int, samples: int) -> list[Any]:
        data = self.data(samples, seed)
        return list(data.calibration_dataloader())


def pruned(model: nn.Module, settings: Settings, batches: list[Any]) -> Figures:
    """Prune a model in place and check its zeros. Returns seconds, sparsity, layer error and notes."""
    result = prune(model, batches, PruningConfig(**settings))
    errors = list(result.layer_errors.values())
    return {
        "seconds": result.seconds,
        "sparsity": counted_sparsity(model, result),
        "layer_error": sum(errors) / len(errors) if errors else None,
        "notes": result.notes,
    }


def counted_sparsity(model: nn.Module, result: PruningResult) -> float:
    """The share of zeros, counted on the pruned weights.

    Raises:
        MaskError: if a pruned weight is not zero, or the number of zeros is not the requested one.
    """
    config = result.config
    result.masks.verify(model)
    zeros = weights = 0
    for name, matrix in result.masks.matrices_in(model):
        zeros, weights = zeros + int((matrix == 0).sum()), weights + matrix.numel()
        if config.pattern is not None:
            n, m = config.structure.n, config.structure.m
            if bool(((matrix != 0).unflatten(1, (-1, m)).sum(2) > n).any()):
                raise MaskError(f"{name} has more than {n} non-zeros in some {m} consecutive weights")
    if abs(zeros / weights - config.sparsity) > _TOLERANCE:
        raise MaskError(f"{zeros / weights:.2%} of the pruned weights are zero, not {config.sparsity:.2%}")
    return zeros / weights


def measure_perplexity(models: PrunedModels, point: Point) -> Figures:
    """The perplexity of a dense or pruned model on the test text."""
    model, account = models.model(point)
    return account | {"perplexity": perplexity(model, models.test)}


def device_of(name: str) -> str:
    """The device with a name; "auto" is a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
