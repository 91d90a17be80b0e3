"""What a run has cost so far, in GPU-hours: wall time x devices, entered under the stage that spent it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

SECONDS_PER_HOUR = 3600.0
RECENT = 10  # the longest of so many durations is what the next one is expected to take


class GPUHourLedger:
    """Charges the time that passes to named stages.

    Time goes to the innermost open `stage`, and outside every stage to the base stage (`switch`). Each stage has two
    figures: wall seconds, and GPU-hours, which are the seconds times the number of devices at the time / 3600.
    Nothing is charged before `start` and after `stop`; both may be called again.

    Args:
        devices: How many devices each second of wall time is charged for.
        clock: Monotonic seconds. Tests put a clock of their own here.
        base_stage: The stage that is charged where no other is open.
    """

    def __init__(
        self, devices: int = 1, clock: Callable[[], float] = time.monotonic, base_stage: str = "setup"
    ) -> None:
        self.devices = devices
        self.clock = clock
        self.base_stage = base_stage
        self._open: list[str] = []
        self._since: float | None = None
        self._started = False
        # [seconds, GPU-hours] of each stage, in the order in which the stages first spent something.
        self._charges: dict[str, list[float]] = {}
        # The part of the charges that was there when `start` was called or a state was loaded.
        self._before: dict[str, list[float]] = {}

    @property
    def running(self) -> bool:
        """Whether time is being charged now."""
        return self._since is not None

    @property
    def started(self) -> bool:
        """Whether `start` has ever been called."""
        return self._started

    @property
    def current_stage(self) -> str:
        """The stage that pays for the present moment."""
        return self._open[-1] if self._open else self.base_stage

    @property
    def hours(self) -> float:
        """GPU-hours spent so far in all stages together, up to this moment."""
        return sum(self.stages.values())

    @property
    def stages(self) -> dict[str, float]:
        """GPU-hours of each stage up to this moment."""
        self._settle()
        return {name: hours for name, (_, hours) in self._charges.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds of each stage up to this moment."""
        self._settle()
        return {name: seconds for name, (seconds, _) in self._charges.items()}

    def hours_of(self, seconds: float) -> float:
        """GPU-hours that so many wall seconds cost on the devices of now."""
        return seconds * self.devices / SECONDS_PER_HOUR

    def seconds_of(self, hours: float) -> float:
        """Wall seconds that so many GPU-hours last on the devices of now."""
        return hours * SECONDS_PER_HOUR / self.devices

    def start(self, devices: int | None = None) -> None:
        """Begin to charge time, or go on after `stop`; a ledger that already runs goes on running.

        Args:
            devices: The number of devices from now on; None leaves it as it is.
        """
        self._settle()
        if devices is not None:
            self.devices = devices
        if not self.running:
            self._since = self.clock()
            self._before = _copy(self._charges)
        self._started = True

    def stop(self) -> None:
        """Charge what has passed, and nothing from now on."""
        self._settle()
        self._since = None

    def switch(self, base_stage: str) -> str:
        """Make `base_stage` the one that pays for time outside every `stage`; returns the one that did."""
        self._settle()
        former, self.base_stage = self.base_stage, base_stage
        return former

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the body of the `with` statement to `name`; stages may be nested, the innermost pays."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def align(self, hours: float) -> None:
        """Raise the total to at least `hours`; the difference goes to the current stage.

        Ranks that started at different moments agree on the largest total in this way.
        """
        missing = hours - self.hours
        if missing > 0:
            self._charge(self.seconds_of(missing))

    def state_dict(self) -> dict[str, Any]:
        """The charges up to this moment, as plain numbers: loads with `torch.load(weights_only=True)`."""
        return {"seconds": self.seconds, "hours": self.stages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: its charges, plus what was spent here since `start`.

        The time between the moment of saving and the end of the process that saved it is not charged; nor are
        charges from before `start`, because a run continued in the same process has them in its state.
        """
        self._settle()
        saved = {name: [float(state["seconds"].get(name, 0.0)), float(hours)] for name, hours in state["hours"].items()}
        spent_here = {
            name: [now - then for now, then in zip(charge, self._before.get(name, (0.0, 0.0)), strict=True)]
            for name, charge in self._charges.items()
        }
        self._charges = _copy(saved)
        self._before = _copy(saved)
        for name, (seconds, hours) in spent_here.items():
            if hours > 0:
                self._add(name, seconds, hours)

    def _settle(self) -> None:
        """Charge the time since the last look at the clock to the current stage."""
        if self._since is None:
            return
        now = self.clock()
        self._charge(now - self._since)
        self._since = now

    def _charge(self, seconds: float) -> None:
        if seconds > 0:
            self._add(self.current_stage, seconds, self.hours_of(seconds))

    def _add(self, name: str, seconds: float, hours: float) -> None:
        charge = self._charges.setdefault(name, [0.0, 0.0])
        charge[0] += seconds
        charge[1] += hours


class Pace:
    """How long a batch, an optimizer step and a validation take: the longest of the last ten.

    All moments are wall seconds of one clock. What happens between two batches (data, checkpoints) belongs to the
    second; a validation reaches from the end of the batch before it to its own end and belongs to no step.
    """

    def __init__(self) -> None:
        self._batches: deque[float] = deque(maxlen=RECENT)
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._validations: deque[float] = deque(maxlen=RECENT)
        self._batch_start = 0.0
        self._step_start = 0.0
        self._step = 0

    @property
    def batch(self) -> float:
        """Seconds to expect of a batch; 0 where none was seen."""
        return max(self._batches, default=0.0)

    @property
    def step(self) -> float:
        """Seconds to expect of an optimizer step with all its batches; 0 where none was seen."""
        return max(self._steps, default=0.0)

    @property
    def validation(self) -> float:
        """Seconds to expect of a validation; 0 where none was seen."""
        return max(self._validations, default=0.0)

    def start(self, now: float, step: int) -> None:
        """Training begins, with `step` optimizer steps taken before."""
        self._batch_start = self._step_start = now
        self._step = step

    def batch_ended(self, now: float, step: int) -> bool:
        """A batch has ended, with `step` optimizer steps taken; returns whether it was the last of a step."""
        self._batches.append(now - self._batch_start)
        self._batch_start = now
        stepped = step != self._step
        if stepped:
            self._steps.append(now - self._step_start)
            self._step_start, self._step = now, step
        return stepped

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


def _copy(charges: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: list(charge) for name, charge in charges.items()}
