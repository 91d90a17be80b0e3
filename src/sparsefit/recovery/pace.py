"""How long the next batch, optimizer step and validation of a run will take, from those before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

RECENT = 10  # the longest of so many durations is what the next one is expected to take


class Pace:
    """The longest of the last ten durations in seconds; 0 where none was seen.

    All moments are wall seconds of one clock. What happens between two batches (data, checkpoints) belongs to the
    second; a validation reaches from the end of the batch before it to its own end and belongs to no step.
    """

    def __init__(self) -> None:
        self.validation_estimate = 0.0  # counts until a validation is seen
        self._batches: deque[float] = deque(maxlen=RECENT)
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._validations: deque[float] = deque(maxlen=RECENT)
        self._batch_start = self._step_start = 0.0
        self._taken = 0

    @property
    def step(self) -> float:
        """Seconds to expect of an optimizer step with all its batches."""
        return max(self._steps, default=0.0)

    @property
    def validation(self) -> float:
        """Seconds to expect of a validation."""
        return max(self._validations, default=self.validation_estimate)

    def start(self, now: float, steps: int) -> None:
        """Training begins, with so many optimizer steps taken before."""
        self._batch_start = self._step_start = now
        self._taken = steps

    def batch_ended(self, now: float, steps: int) -> float:
        """A batch has ended, with so many optimizer steps taken; returns the seconds to expect of what comes next.

        That is a step, or one more batch where this one was not the last of its step.
        """
        self._batches.append(now - self._batch_start)
        self._batch_start = now
        if steps == self._taken:
            return max(self._batches)
        self._steps.append(now - self._step_start)
        self._step_start, self._taken = now, steps
        return self.step

    def validation_ended(self, now: float) -> None:
        """A validation has ended."""
        seconds = now - self._batch_start
        self._validations.append(seconds)
        self._batch_start = now
        self._step_start += seconds

    def state_dict(self) -> dict[str, list[float]]:
        """The durations seen, for the next process to expect; plain numbers."""
        return {"steps": list(self._steps), "validations": list(self._validations)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Expect the durations of an earlier process until there are others."""
        self._steps.extend(state["steps"])
        self._validations.extend(state["validations"])


def estimate_validation(marks: Sequence[float], batches: float) -> float:
    """Seconds of a whole validation, from a sanity check of its first batches.

    Args:
        marks: Moments in seconds: the start of the check, the end of each of its batches, its end.
        batches: Batches of a whole validation; infinity where unknown: then the check's own time is all there is.
    """
    *ends, finished = marks[1:]
    taken = finished - marks[0]
    if not ends or math.isinf(batches):
        return taken
    # The first batch pays for what happens once: workers, kernels, compilation.
    one = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else taken
    return taken + max(batches - len(ends), 0) * one
