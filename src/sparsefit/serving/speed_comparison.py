"""A pruned model held against its dense twin in one runtime after the other, and what came of it in one sentence."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsefit.pruning import MaskSet
from sparsefit.serving.dense_twin import dense_twin
from sparsefit.serving.logit_checks import check_difference, decoder_difference, prompts
from sparsefit.serving.runtimes import RUNTIMES, Runtime
from sparsefit.serving.timing import LEAST_REPEATS, PHASES, Speed, gained, measure, ratio

_SMALLER = 0.95
"""Shares of the dense model's memory above this are no gain."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        batch_sizes: Sequences that run at once, one measurement for each.
        prompt: Tokens of a prompt, which are read at once.
        tokens: Tokens after it, one after the other.
        repeats: Repeats of each measurement.
        clock: Seconds, of the wall's clock or another.
    """

    batch_sizes: Sequence[int] = (1, 8)
    prompt: int = 128
    tokens: int = 32
    repeats: int = 5
    clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Row:
    """One runtime at one batch size.

    Attributes:
        runtime: Its name.
        batch: The batch size.
        dense_bytes: Memory of the dense twin's weights.
        pruned_bytes: Memory of the pruned model's weights.
        dense: Speed of the dense twin, by phase.
        pruned: Speed of the pruned model.
        difference: The largest difference of a logit of the pruned model from plain torch's, as a share.
        note: What is to be known of its figures.
    """

    runtime: str
    batch: int
    dense_bytes: int
    pruned_bytes: int
    dense: dict[str, Speed]
    pruned: dict[str, Speed]
    difference: float
    note: str = ""

    def ratio(self, phase: str) -> float:
        """How many times as fast as the dense twin the pruned model is."""
        return ratio(self.pruned[phase], self.dense[phase])

    def gained(self, phase: str) -> bool:
        """Whether the pruned model is faster beyond the noise, by its zeros."""
        return RUNTIMES[self.runtime].uses_zeros and gained(self.pruned[phase], self.dense[phase])

    def account(self) -> dict[str, Any]:
        """All of it, for JSON."""
        of = {"dense": self.dense, "pruned": self.pruned}
        told: dict[str, Any] = {"runtime": self.runtime, "batch": self.batch, "logits_difference": self.difference}
        told |= {"weight_bytes": {"dense": self.dense_bytes, "pruned": self.pruned_bytes}}
        for phase in PHASES:
            told[phase] = {name: {"median": s[phase].median, "repeats": s[phase].repeats} for name, s in of.items()}
            told[phase] |= {"ratio": self.ratio(phase), "gained": self.gained(phase)}
        return told


def compare(
    model: nn.Module,
    masks: MaskSet,
    runtime: Runtime,
    settings: Settings,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Measure a pruned model and its dense twin in one runtime: a row for each batch size, once it is measured.

    Args:
        model: A pruned decoder of transformers, in evaluation mode; it stays as it is.
        masks: Its masks.
        runtime: One that can run it.
        settings: What is measured.
        advance: Called after each repeat of one of the two.

    Raises:
        ExportError: if the runtime computes something else than plain torch.
    """
    dense_in = RUNTIMES["torch"] if runtime.sparse else runtime
    dense = dense_in.prepare(dense_twin(model), masks)
    pruned = runtime.prepare(copy.deepcopy(model), masks)
    difference = decoder_difference(model, pruned)
    check_difference(difference, runtime.name, next(model.parameters()).dtype)
    for batch in settings.batch_sizes:
        ids = prompts(model, batch, settings.prompt)
        both = {"dense": dense, "pruned": pruned}
        found = measure(both, ids, settings.tokens, settings.repeats, advance, settings.clock)
        sizes = dense.weight_bytes, pruned.weight_bytes
        yield Row(runtime.name, batch, *sizes, found["dense"], found["pruned"], difference, pruned.note)


def verdict(rows: Iterable[Row]) -> str:
    """Whether pruning gained speed or memory here, in one sentence."""
    rows = list(rows)
    if not rows:
        return "No runtime that was asked for can run the model here, so nothing was measured."
    named = [(row.ratio(phase), row, phase) for row in rows for phase in PHASES]
    faster = [(times, row, phase) for times, row, phase in named if row.gained(phase)]
    few = any(len(row.pruned[phase].repeats) < LEAST_REPEATS for row in rows for phase in PHASES)
    left_open = f" Below --repeats {LEAST_REPEATS} no gain in speed is claimed." if few else ""
    best, row, phase = max(faster or named, key=lambda entry: entry[0])
    where = f"{row.runtime}, {phase} at batch {row.batch}"
    share, runtime = min((row.pruned_bytes / max(1, row.dense_bytes), row.runtime) for row in rows)
    small = share <= _SMALLER
    if not faster and not small:
        return (
            "Nothing is gained here: the pruned model is nowhere faster than the dense one beyond the noise (at best "
            f"{best:.2f} times as fast: {where}), and nowhere smaller in memory.{left_open}"
        )
    speed = f"faster (at best {best:.2f} times: {where})" if faster else f"nowhere faster (at best {best:.2f} times)"
    memory = f"smaller in memory ({share:.2f} of the dense one's weights: {runtime})" if small else "nowhere smaller"
    return f"The pruned model is {speed} and {memory}.{left_open}"
