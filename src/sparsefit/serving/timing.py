"""Measures the speed of decoders in prefill and decode, with a pruned model and its dense twin alternately."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsefit.serving.decoders import Decoder

GAIN = 1.1
"""The smallest ratio that counts as a gain: the same kernels on other numbers differed by up to 6%."""

LEAST_REPEATS = 4
"""With fewer repeats, a gain cannot be distinguished from other load on the machine."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one phase, in each repeat."""

    repeats: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.repeats)

    @property
    def spread(self) -> tuple[float, float]:
        """The slowest and the fastest repeat."""
        return min(self.repeats), max(self.repeats)


PHASES = ("prefill", "decode")


def measure(
    decoders: Mapping[str, Decoder],
    ids: Tensor,
    tokens: int,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Speed]]:
    """Speed of several decoders on the same prompts, by name and phase.

    In each repeat all decoders run one after another, and every second repeat runs them in reverse, so that order and
    other load affect all equally.

    Args:
        decoders: The decoders by name.
        ids: Prompts (batch, tokens).
        tokens: Steps of one token after the prompts.
        repeats: Number of repeats. One more runs before them and does not count.
        advance: Called after each decoder's repeat.
        clock: Returns seconds.
    """
    found: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in decoders}
    for repeat in range(repeats + 1):
        for name in list(decoders)[:: -1 if repeat % 2 else 1]:
            seconds = _time(decoders[name], ids, tokens, clock)
            advance()
            if repeat:
                counts = (ids.numel(), len(ids) * tokens)
                for phase, count, taken in zip(PHASES, counts, seconds, strict=True):
                    found[name][phase].append(count / taken)
    return {name: {phase: Speed(tuple(values)) for phase, values in own.items()} for name, own in found.items()}


def _time(decoder: Decoder, ids: Tensor, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the prompts, and of all steps after them."""
    begun = clock()
    token = _next_token(decoder.start(ids))
    read = clock()
    for _ in range(tokens):
        token = _next_token(decoder.step(token))
    return read - begun, clock() - read


def _next_token(logits: Tensor) -> Tensor:
    """The most likely next token of each sequence, copied to the CPU, which waits for the GPU."""
    return logits[:, -1:].argmax(dim=-1).cpu()


def ratio(pruned: Speed, dense: Speed) -> float:
    """The pruned model's speed as a multiple of the dense one's: the median of the ratios of single repeats.

    >>> ratio(Speed((2.0, 3.0, 2.0)), Speed((1.0, 2.0, 1.0)))
    2.0
    """
    return statistics.median(a / b for a, b in zip(pruned.repeats, dense.repeats, strict=True))


def gained(pruned: Speed, dense: Speed) -> bool:
    """Whether a ratio is a gain and not noise: at least `GAIN`, with three of four repeats faster than the dense ones.

    It is false for fewer than `LEAST_REPEATS` repeats.

    >>> gained(Speed((2.0, 2.1, 2.0, 2.2)), Speed((1.0, 1.0, 1.1, 1.0))), gained(Speed((1.02,)), Speed((1.0,)))
    (True, False)
    """
    faster = [a > b for a, b in zip(pruned.repeats, dense.repeats, strict=True)]
    return len(faster) >= LEAST_REPEATS and ratio(pruned, dense) >= GAIN and sum(faster) >= 0.75 * len(faster)
