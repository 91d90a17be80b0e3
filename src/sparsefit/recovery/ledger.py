"""What a run has cost so far, in GPU-hours: wall time x devices, entered under the stage that spent it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SECONDS_PER_HOUR = 3600.0


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

    def switch(self, base_stage: str) -> None:
        """Make `base_stage` the one that pays for time outside every `stage`."""
        self._settle()
        self.base_stage = base_stage

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
            self._charge(missing * SECONDS_PER_HOUR / self.devices)

    def state_dict(self) -> dict[str, Any]:
        """The charges up to this moment, as plain numbers: loads with `torch.load(weights_only=True)`."""
        return {"seconds": self.seconds, "hours": self.stages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: its charges, plus what was spent here since `start`.

        The time between the moment of saving and the end of the process that saved it is not charged; nor are
        charges from before `start`, because a run continued in the same process has them in its state.
        """
        self._settle()
        saved = {
            name: [float(state["seconds"].get(name, 0.0)), float(hours)] for name, hours in state["hours"].items()
        }
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
            self._add(self.current_stage, seconds, seconds * self.devices / SECONDS_PER_HOUR)

    def _add(self, name: str, seconds: float, hours: float) -> None:
        charge = self._charges.setdefault(name, [0.0, 0.0])
        charge[0] += seconds
        charge[1] += hours


def _copy(charges: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: list(charge) for name, charge in charges.items()}
