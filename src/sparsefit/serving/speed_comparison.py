"""Compares a pruned model with its dense twin in each runtime, and sums up the result in one sentence."""

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
"""The pruned model counts as smaller if it needs at most this share of the dense model's memory."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Args:
        batch_sizes: Numbers of sequences that run together; each is measured.
        prompt: Tokens of a prompt, which are read together.
        tokens: Tokens after the prompt, one at a time.
        repeats: Repeats of each measurement.
        clock: Returns seconds: of wall time, or of processor time.
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
        runtime: The runtime's name.
        batch: The batch size.
        dense_bytes: Memory of the dense twin's weights.
        pruned_bytes: Memory of the pruned model's weights.
        dense: Speed of the dense twin, by phase.
        pruned: Speed of the pruned model, by phase.
        difference: The largest difference of the pruned model's logits from plain torch's, relative to the largest.
        note: A remark on its measurements.
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
        """The pruned model's speed as a multiple of the dense twin's."""
        return ratio(self.pruned[phase], self.dense[phase])

    def gained(self, phase: str) -> bool:
        """Whether zeros make it faster beyond noise."""
        return RUNTIMES[self.runtime].uses_zeros and gained(self.pruned[phase], self.dense[phase])

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        models = {"dense": self.dense, "pruned": self.pruned}
        entries: dict[str, Any] = {"runtime": self.runtime, "batch": self.batch, "logits_difference": self.difference}
        entries |= {"weight_bytes": {"dense": self.dense_bytes, "pruned": self.pruned_bytes}}
        for phase in PHASES:
            speeds = {name: speed[phase] for name, speed in models.items()}
            entries[phase] = {name: {"median": s.median, "repeats": s.repeats} for name, s in speeds.items()}
            entries[phase] |= {"ratio": self.ratio(phase), "gained": self.gained(phase)}
        return entries


def compare(
    model: nn.Module,
    masks: MaskSet,
    runtime: Runtime,
    settings: Settings,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Measure a pruned model and its dense twin in one runtime, and yield a row for each batch size.

    Args:
        model: A pruned decoder of transformers, in evaluation mode; it is not changed.
        masks: The model's masks.
        runtime: A runtime that can run it.
        settings: Settings of the measurement.
        advance: Called after each repeat of either model.

    Raises:
        ExportError: if the runtime's logits are not those of plain torch.
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
    """Whether pruning gained speed or memory on this machine, in one sentence."""
    rows = list(rows)
    if not rows:
        return "None of the chosen runtimes can run the model on this machine, so nothing was measured."
    named = [(row.ratio(phase), row, phase) for row in rows for phase in PHASES]
    faster = [(times, row, phase) for times, row, phase in named if row.gained(phase)]
    few = any(len(row.pruned[phase].repeats) < LEAST_REPEATS for row in rows for phase in PHASES)
    too_few = f" With fewer than {LEAST_REPEATS} repeats, no gain in speed is claimed." if few else ""
    best, row, phase = max(faster or named, key=lambda entry: entry[0])
    where = f"{row.runtime}, {phase} at batch {row.batch}"
    share, runtime = min((row.pruned_bytes / max(1, row.dense_bytes), row.runtime) for row in rows)
    small = share <= _SMALLER
    if not faster and not small:
        return (
            "No gain on this machine: the pruned model is not faster than the dense one beyond noise (at best "
            f"{best:.2f} times as fast: {where}), and not smaller in memory.{too_few}"
        )
    speed = f"faster (at best {best:.2f} times: {where})" if faster else f"not faster (at best {best:.2f} times)"
    memory = f"smaller in memory ({share:.2f} of the dense one's weights: {runtime})" if small else "not smaller"
    return f"The pruned model is {speed} and {memory}.{too_few}"
