"""The GPU-hours of a run (wall time x devices): what each stage has spent, and what is left of a budget."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from sparsefit.errors import ConfigError
from sparsefit.settings import number

STAGES = ("reconstruction", "training")
"""The stages that a budget can be split between, in execution order."""

_ROUNDING = 1e-9  # tolerance for the rounding error of many small charges, as a share of the budget


class GPUHourLedger:
    """Charges elapsed time to stages, and computes what may still be spent.

    Time is charged to the innermost open `stage`, and outside of stages to the base stage (`switch`). Nothing is
    charged before `start` and after `stop`. Time is kept in wall seconds and in GPU-hours, which are seconds times the
    number of devices / 3600.

    What may still be spent is computed from `spent` and `limit`, as last agreed on by all ranks, so that all ranks make
    the same decision. `limit` excludes the part of the budget that is kept for the end of the run. Both are GPU-hours.

    Args:
        gpu_hours: The budget; infinity if there is none.
        split: Shares of the stages, as `check_split` returns them.
        base_stage: The stage charged while no other is open.
        clock: Returns monotonic seconds; tests pass their own clock.
    """

    def __init__(
        self,
        gpu_hours: float = math.inf,
        split: Mapping[str, float] | None = None,
        base_stage: str = "setup",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.devices = 1
        self.started = False  # whether `start` was ever called
        self.split = split
        self.spent, self.limit = 0.0, gpu_hours
        self._ends: dict[str, float] = {}  # GPU-hours at which the share of a stage is used up
        self._open = [base_stage]
        self._since: float | None = None  # when the clock was last read; None while it is stopped
        self._charges = {"seconds": Counter[str](), "hours": Counter[str]()}
        self._at_start = self.state_dict()

    @property
    def running(self) -> bool:
        """Whether time is being charged now."""
        return self._since is not None

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds of each stage until now, in the order of their first charge."""
        return self.state_dict()["seconds"]

    @property
    def stages(self) -> dict[str, float]:
        """GPU-hours of each stage until now."""
        return self.state_dict()["hours"]

    @property
    def hours(self) -> float:
        """GPU-hours of all stages until now."""
        return sum(self.stages.values())

    @property
    def left(self) -> float:
        """Wall seconds that may still be spent before the end of the run; negative if too much was spent."""
        return self.seconds_of(self.limit - self.spent)

    def hours_of(self, seconds: float) -> float:
        """Convert wall seconds to GPU-hours on the current number of devices."""
        return seconds * self.devices / 3600

    def seconds_of(self, hours: float) -> float:
        """Convert GPU-hours to wall seconds on the current number of devices."""
        return hours * 3600 / self.devices

    def start(self, devices: int) -> None:
        """Charge time from now on, for this number of devices; no effect on a running ledger."""
        if not self.running:
            self._at_start, self._ends = self.state_dict(), {}
            self.devices, self._since, self.started = devices, self.clock(), True

    def stop(self) -> None:
        """Charge the time until now, and stop charging."""
        self._settle()
        self._since = None

    def switch(self, base_stage: str) -> None:
        """Charge time outside every `stage` to `base_stage` from now on."""
        self._settle()
        self._open[0] = base_stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the body of the `with` statement to `name`; of nested stages the innermost is charged."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def agree(self, spent: float, limit: float) -> None:
        """Set the values that all ranks agreed on; hours missing on this rank are charged to its current stage.

        Args:
            spent: GPU-hours until now, the maximum over ranks, as they start at different times.
            limit: GPU-hours that may be spent before the end of the run.
        """
        self._charge(self.seconds_of(spent - self.hours))
        self.spent, self.limit = spent, limit

    def affords(self, seconds: float) -> bool:
        """Whether something is left and this many more wall seconds fit."""
        left, rounding = self.limit - self.spent, _ROUNDING * self.limit
        return left == math.inf or (left > rounding and self.hours_of(seconds) <= left + rounding)

    def share(self, stage: str) -> float:
        """Wall seconds that a stage may still take: its share of what was left at its first call, minus what it spent.

        Args:
            stage: One of `STAGES`. The last of them, training, may take all that is left.

        Raises:
            ConfigError: if there is no such stage.
        """
        if stage not in STAGES:
            raise ConfigError(f"A budget has no share for {stage!r}: it can be split between {_names(STAGES)}.")
        left = max(0.0, self.limit - self.spent)
        if stage != STAGES[-1] and self.split is not None:
            end = self._ends.setdefault(stage, self.spent + self.split.get(stage, 0.0) * left)
            left = min(left, max(0.0, end - self.spent))
        return self.seconds_of(left)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The charges until now as plain numbers, which load with `torch.load(weights_only=True)`."""
        self._settle()
        return {kind: dict(charges) for kind, charges in self._charges.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Restore saved charges, and add what was spent here since `start`.

        Time between the save and the end of the process that saved is not charged. Charges from before `start` are
        dropped, as the state of a run that continues in the same process includes them.
        """
        now = self.state_dict()
        for kind, charges in self._charges.items():
            here = Counter(now[kind])
            here.subtract(self._at_start[kind])
            charges.clear()
            charges.update(state[kind])
            charges.update(+here)
        self._at_start = {kind: dict(state[kind]) for kind in now}

    def _settle(self) -> None:
        """Charge the time since the clock was last read."""
        if self._since is not None:
            now = self.clock()
            self._charge(now - self._since)
            self._since = now

    def _charge(self, seconds: float) -> None:
        if seconds > 0:
            self._charges["seconds"][self._open[-1]] += seconds
            self._charges["hours"][self._open[-1]] += self.hours_of(seconds)


def check_split(split: Mapping[str, float]) -> dict[str, float]:
    """The shares of a budget's stages, as plain floats.

    Args:
        split: Shares of at least 0 that add up to 1 (within 1e-6), for names of `STAGES`; a stage left out has 0.

    Raises:
        ConfigError: if a name is unknown, a share is not such a number, or the sum is not 1.
    """
    way_out = (
        f"A budget can be split between {_names(STAGES)}, by shares of what is left when the model is pruned that add "
        "up to 1, as in {reconstruction: 0.2, training: 0.8}"
    )
    if not isinstance(split, Mapping):
        raise ConfigError(f"split must name the stages' shares, not {split!r}. {way_out}")
    if unknown := [name for name in split if name not in STAGES]:
        raise ConfigError(f"split has a share for {_names(unknown)}. {way_out}")
    shares = {name: float(number(f"the split's share for {name}", share, least=0)) for name, share in split.items()}
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(f"The shares of split, {shares}, add up to {sum(shares.values()):.6g}. {way_out}")
    return shares


def _names(names: Iterable[object]) -> str:
    return " and ".join(map(repr, names))
