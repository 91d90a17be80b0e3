"""How long the next optimizer step and validation of a run will take, from those before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

RECENT = 10  # the longest of so many durations is what the next one is expected to take


class StepTimes:
    """The longest of the last ten durations in seconds; 0 where none was seen.

    All moments are wall seconds of one clock. What happens between two batches (data, checkpoints) belongs to the
    second; a validation reaches from the end of the batch before it to its own end and belongs to no step.
    """

    def __init__(self) -> None:
        self.steps, self.validations = deque[float](maxlen=RECENT), deque[float](maxlen=RECENT)
        self.validation_estimate = 0.0  # counts until a validation is seen
        self._step_start = self._last = 0.0  # `_last`: the end of the last batch or validation
        self._taken = 0

    @property
    def step(self) -> float:
        """Seconds to expect of an optimizer step with all its batches."""
        return max(self.steps, default=0.0)

    @property
    def usual_step(self) -> float:
        """The median of the steps seen; 0 where none was."""
        return median(self.steps) if self.steps else 0.0

    @property
    def validation(self) -> float:
        """Seconds to expect of a validation."""
        return max(self.validations, default=self.validation_estimate)

    def start(self, now: float, steps: int) -> None:
        """Training begins, with so many optimizer steps taken before."""
        self._step_start, self._last, self._taken = now, now, steps

    def batch_ended(self, now: float, steps: int) -> bool:
        """A batch has ended, with so many optimizer steps taken; returns whether it was the last one of its step."""
        self._last = now
        if steps == self._taken:
            return False
        self.steps.append(now - self._step_start)
        self._step_start, self._taken = now, steps
        return True

    def validation_ended(self, now: float) -> None:
        """A validation has ended."""
        self.validations.append(now - self._last)
        self._step_start += now - self._last
        self._last = now

    def state_dict(self) -> dict[str, list[float]]:
        """The durations seen, for the next process to expect; plain numbers."""
        return {"steps": list(self.steps), "validations": list(self.validations)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], slower: float | None = None) -> None:
        """Expect the durations of an earlier process until there are others.

        Args:
            state: What `state_dict` gave.
            slower: Of a process on other devices, of whose durations only the longest validation counts, times this.
        """
        if slower is not None:
            self.validation_estimate = slower * max(state["validations"], default=0.0)
            return
        self.steps.extend(state["steps"])
        self.validations.extend(state["validations"])


def estimate_validation(marks: Sequence[float], batches: float) -> float:
    """Seconds of a whole validation, from a sanity check of its first batches.

    Args:
        marks: Moments in seconds: the start of the check, the end of each of its batches, its end.
        batches: Batches of a whole validation; infinity where unknown: then the check's own time is all there is.
    """
    start, *ends, finished = marks
    taken = finished - start
    if not ends or math.isinf(batches):
        return taken
    # The first batch pays for what happens once: workers, kernels, compilation.
    one = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else taken
    return taken + max(batches - len(ends), 0) * one
