"""How fast decoders run: prompts and single tokens, a pruned model and its dense twin in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsefit.serving.decoders import Decoder

GAIN = 1.1
"""Ratios below this are no gain: one and the same kernels on other numbers were seen to differ by 6%."""

LEAST_REPEATS = 4
"""Fewer repeats do not tell a gain from what else the machine did."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one phase, in each of its repeats."""

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

    In each repeat all of them run one after the other, in turns forwards and backwards, so that neither their order nor
    whatever else the machine does favours one.

    Args:
        decoders: By name.
        ids: Prompts (batch, tokens).
        tokens: Steps of one token behind the prompts.
        repeats: How often; one more goes before them and does not count.
        advance: Called after each decoder's repeat.
        clock: Seconds.
    """
    found: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in decoders}
    for repeat in range(repeats + 1):
        for name in list(decoders)[:: -1 if repeat % 2 else 1]:
            seconds = _timed(decoders[name], ids, tokens, clock)
            advance()
            if repeat:
                counts = (ids.numel(), len(ids) * tokens)
                for phase, count, taken in zip(PHASES, counts, seconds, strict=True):
                    found[name][phase].append(count / taken)
    return {name: {phase: Speed(tuple(values)) for phase, values in own.items()} for name, own in found.items()}


def _timed(decoder: Decoder, ids: Tensor, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds that the prompts take, and all steps after them."""
    begun = clock()
    token = _chosen(decoder.start(ids))
    read = clock()
    for _ in range(tokens):
        token = _chosen(decoder.step(token))
    return read - begun, clock() - read


def _chosen(logits: Tensor) -> Tensor:
    """The likeliest next token of each sequence, on the CPU: a GPU has then done its work."""
    return logits[:, -1:].argmax(dim=-1).cpu()


def ratio(pruned: Speed, dense: Speed) -> float:
    """How many times as fast the pruned model is: the median over the repeats, each against its own twin.

    >>> ratio(Speed((2.0, 3.0, 2.0)), Speed((1.0, 2.0, 1.0)))
    2.0
    """
    return statistics.median(a / b for a, b in zip(pruned.repeats, dense.repeats, strict=True))


def gained(pruned: Speed, dense: Speed) -> bool:
    """Whether a ratio is a gain and no noise: above `GAIN`, and three of four repeats faster than their twin.

    Fewer than `LEAST_REPEATS` repeats never show one.

    >>> gained(Speed((2.0, 2.1, 2.0, 2.2)), Speed((1.0, 1.0, 1.1, 1.0))), gained(Speed((1.02,)), Speed((1.0,)))
    (True, False)
    """
    faster = [a > b for a, b in zip(pruned.repeats, dense.repeats, strict=True)]
    return len(faster) >= LEAST_REPEATS and ratio(pruned, dense) >= GAIN and sum(faster) >= 0.75 * len(faster)
