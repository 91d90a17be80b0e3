"""Estimates how long the next optimizer step and the next validation of a run will take."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

RECENT = 10  # the longest of this many recent durations is the estimate for the next one


class StepTimes:
    """Recent durations of optimizer steps and validations, in seconds.

    All times are wall seconds of one clock. Time between two batches (data, checkpoints) counts for the second one. A
    validation lasts from the end of the batch before it to its own end, and counts for no step.
    """

    def __init__(self) -> None:
        self.steps, self.validations = deque[float](maxlen=RECENT), deque[float](maxlen=RECENT)
        self.validation_estimate = 0.0  # used until a validation was timed
        self._step_start = self._last = 0.0  # `_last`: the end of the last batch or validation
        self._taken = 0

    @property
    def step(self) -> float:
        """Expected seconds of an optimizer step with all its batches, the longest recent one; 0 before the first."""
        return max(self.steps, default=0.0)

    @property
    def usual_step(self) -> float:
        """Median seconds of recent steps; 0 before the first."""
        return median(self.steps) if self.steps else 0.0

    @property
    def validation(self) -> float:
        """Expected seconds of a validation, the longest recent one or the estimate."""
        return max(self.validations, default=self.validation_estimate)

    def start(self, now: float, steps: int) -> None:
        """Start timing when training begins, after `steps` optimizer steps."""
        self._step_start, self._last, self._taken = now, now, steps

    def batch_ended(self, now: float, steps: int) -> bool:
        """Record the end of a batch, after `steps` optimizer steps; returns whether it was the last of its step."""
        self._last = now
        if steps == self._taken:
            return False
        self.steps.append(now - self._step_start)
        self._step_start, self._taken = now, steps
        return True

    def validation_ended(self, now: float) -> None:
        """Record the end of a validation."""
        self.validations.append(now - self._last)
        self._step_start += now - self._last
        self._last = now

    def state_dict(self) -> dict[str, list[float]]:
        """The recent durations as plain numbers."""
        return {"steps": list(self.steps), "validations": list(self.validations)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], slower: float | None = None) -> None:
        """Use the durations of an earlier process as estimates.

        Args:
            state: What `state_dict` returned.
            slower: Set if that process had another number of devices. Then only its longest validation is used,
                multiplied by this factor.
        """
        if slower is not None:
            self.validation_estimate = slower * max(state["validations"], default=0.0)
            return
        self.steps.extend(state["steps"])
        self.validations.extend(state["validations"])


def estimate_validation(marks: Sequence[float], batches: float) -> float:
    """Estimate the seconds of a whole validation from a sanity check of its first batches.

    Args:
        marks: Times in seconds: the start of the check, the end of each of its batches, its end.
        batches: Batches of a whole validation; infinity if unknown: then the time of the check is returned.
    """
    start, *ends, finished = marks
    taken = finished - start
    if not ends or math.isinf(batches):
        return taken
    # The first batch includes one-time costs: workers, kernels, compilation.
    one = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else taken
    return taken + max(batches - len(ends), 0) * one
