"""Evaluates a model during a fit by running the Trainer's own validation loop."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng

PREFIXES = ("val_", "val/")
"""The prefixes of metrics logged by a validation."""
_LOWER = ("loss", "perplexity", "ppl", "error", "err", "wer", "cer", "mse", "mae", "rmse", "nll", "divergence")


def validated(trainer: Trainer, declared: Collection[str] = ()) -> dict[str, float]:
    """Run a whole validation and return the metrics that it logs as `val_...`; empty if there is no validation.

    Other callbacks and loggers are not called, and random states are restored afterwards.

    Args:
        trainer: A trainer in a fit.
        declared: Names, without `val_`, of the metrics to return under these names; empty returns all.
    """
    if not trainer.enable_validation:
        return {}
    with _unseen(trainer), isolate_rng():
        trainer.callback_metrics.clear()
        trainer.fit_loop.epoch_loop.val_loop.run()
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = {name: value for name, value in logged.items() if name.startswith(PREFIXES) and math.isfinite(value)}
    if declared:
        return {name: value for name in declared if (value := found.get(logged_as(name))) is not None}
    return found


def logged_as(metric: str) -> str:
    """The name under which a validation logs a metric."""
    return metric if metric.startswith(PREFIXES) else f"val_{metric}"


def better(name: str) -> str:
    """Whether a lower or a higher value is better, guessed from the name: "lower" for losses and errors, else
    "higher"."""
    words = name.lower().replace("/", "_").replace("-", "_").split("_")
    return "lower" if any(word in _LOWER or word.endswith("loss") for word in words) else "higher"


@contextmanager
def _unseen(trainer: Trainer) -> Iterator[None]:
    callbacks, loggers, seen = trainer.callbacks, trainer.loggers, dict(trainer.callback_metrics)
    # A module may use its logger during validation.
    trainer.callbacks, trainer.loggers = [], [DummyLogger() for _ in loggers]
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True
        trainer.callbacks, trainer.loggers = callbacks, loggers
        trainer.callback_metrics.clear()
        trainer.callback_metrics.update(seen)
