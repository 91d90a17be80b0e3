"""The GPU-hours of a run, wall time x devices: what each stage has spent, and what a budget still allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sparsefit.errors import ConfigError
from sparsefit.settings import number

STAGES = ("reconstruction", "training")
"""The stages that a budget can be split between, in the order in which they run."""


class GPUHourLedger:
    """Charges the time that passes to stages, and tells what may still be spent.

    Time goes to the innermost open `stage`, and outside every stage to the base stage (`switch`). Nothing is charged
    before `start` and after `stop`. Time has two figures: wall seconds, and GPU-hours, which are the seconds times the
    number of devices / 3600.

    What may be spent follows from two figures that all ranks agreed on last, so that each comes to the same decision:
    `spent`, and the `limit` that leaves the end of the run its part of the budget.

    Args:
        gpu_hours: The budget; infinity where there is none.
        split: Shares of the stages, as `check_split` gives them.
        base_stage: The stage that is charged where no other is open.
        clock: Monotonic seconds. Tests put a clock of their own here.
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
        self.started = False  # ever
        self.split = split
        self.spent, self.limit = 0.0, gpu_hours
        self._ends: dict[str, float] = {}  # GPU-hours at which the share of a stage is used up
        self._open = [base_stage]
        self._since: float | None = None  # the last look at the clock; None: it stands
        # The number of devices may change from one start to the next, but not between: since then, seconds are enough.
        self._before: dict[str, dict[str, float]] = {"seconds": {}, "hours": {}}
        self._here: dict[str, float] = {}

    @property
    def running(self) -> bool:
        """Whether time is being charged now."""
        return self._since is not None

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds of each stage up to this moment, in the order in which they first spent something."""
        self._settle()
        return _sum(self._before["seconds"], self._here)

    @property
    def stages(self) -> dict[str, float]:
        """GPU-hours of each stage up to this moment."""
        self._settle()
        return _sum(self._before["hours"], {name: self.hours_of(seconds) for name, seconds in self._here.items()})

    @property
    def hours(self) -> float:
        """GPU-hours of all stages up to this moment."""
        return sum(self.stages.values())

    @property
    def now(self) -> float:
        """Wall seconds of the run on the devices of now, as the ranks agreed on them last."""
        return self.seconds_of(self.spent)

    def hours_of(self, seconds: float) -> float:
        """GPU-hours that so many wall seconds cost on the devices of now."""
        return seconds * self.devices / 3600

    def seconds_of(self, hours: float) -> float:
        """Wall seconds that so many GPU-hours last on the devices of now."""
        return hours * 3600 / self.devices

    def start(self, devices: int) -> None:
        """Charge time from now on, on so many devices; a ledger that already runs goes on as it is."""
        if not self.running:
            self._before, self._here, self._ends = self.state_dict(), {}, {}
            self.devices, self._since, self.started = devices, self.clock(), True

    def stop(self) -> None:
        """Charge what has passed, and nothing from now on."""
        self._settle()
        self._since = None

    def switch(self, base_stage: str) -> None:
        """Make `base_stage` the one that pays for time outside every `stage`."""
        self._settle()
        self._open[0] = base_stage

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

    def agree(self, spent: float, limit: float) -> None:
        """Take what all ranks agreed on; what is missing from the ledger of this one is charged to the stage of now.

        Args:
            spent: GPU-hours up to this moment: the most of all ranks, which have started at different moments.
            limit: GPU-hours that may be spent before the end of the run.
        """
        self._charge(self.seconds_of(spent - self.hours))
        self.spent, self.limit = spent, limit

    def affords(self, hours: float, slack: float = 0.0) -> bool:
        """Whether something is left, and `hours` more fit; `slack` is the share by which they may miss it."""
        return self.spent < self.limit and self.spent + hours <= self.limit * (1 + slack)

    def share(self, stage: str) -> float:
        """GPU-hours that a stage may still take: its share of what was left when it asked first, less what went since.

        Args:
            stage: One of `STAGES`. The last of them, training, may take all that is left.

        Raises:
            ConfigError: There is no such stage.
        """
        if stage not in STAGES:
            raise ConfigError(f"A budget has no share for {stage!r}: it can be split between {_names(STAGES)}.")
        left = max(0.0, self.limit - self.spent)
        if stage == STAGES[-1] or self.split is None:
            return left
        end = self._ends.setdefault(stage, self.spent + self.split.get(stage, 0.0) * left)
        return min(left, max(0.0, end - self.spent))

    def state_dict(self) -> dict[str, Any]:
        """The charges up to this moment, as plain numbers: loads with `torch.load(weights_only=True)`."""
        return {"seconds": self.seconds, "hours": self.stages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: its charges, plus what was spent here since `start`.

        The time between the moment of saving and the end of the process that saved it is not charged; nor are
        charges from before `start`, because a run continued in the same process has them in its state.
        """
        self._before = {key: dict(state[key]) for key in ("seconds", "hours")}

    def _settle(self) -> None:
        """Charge the time since the last look at the clock."""
        if self._since is not None:
            now = self.clock()
            self._charge(now - self._since)
            self._since = now

    def _charge(self, seconds: float) -> None:
        if seconds > 0:
            self._here[self._open[-1]] = self._here.get(self._open[-1], 0.0) + seconds


def check_split(split: Mapping[str, float]) -> dict[str, float]:
    """The shares of a budget's stages, as plain floats.

    Args:
        split: Shares of at least 0 that add up to 1 (within 1e-6), for names of `STAGES`; a stage left out has 0.

    Raises:
        ConfigError: A name is unknown, a share is no such number, or the sum is another; it says which.
    """
    example = "{reconstruction: 0.2, training: 0.8}"
    if not isinstance(split, Mapping):
        raise ConfigError(f"split must name the stages' shares, as in {example}, not {split!r}.")
    unknown = [name for name in split if name not in STAGES]
    if unknown:
        raise ConfigError(
            f"split has a share for {_names(unknown)}, but a budget can only be split between {_names(STAGES)}, "
            f"as in {example}. What comes before and after them is charged to the budget without a share."
        )
    shares = {name: float(number(f"the split's share for {name}", share, least=0)) for name, share in split.items()}
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        listed = " + ".join(f"{name} {share:g}" for name, share in shares.items()) or "no share at all"
        raise ConfigError(
            f"The shares of split add up to {total:.6g}, not to 1: {listed}. They are shares of what is left when the "
            f"model is pruned. Make them add up to 1, as in {example}, or leave split out."
        )
    return shares


def _names(names: Iterable[object]) -> str:
    return " and ".join(map(repr, names))


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}
