"""What a budget allows: the GPU-hours that may be spent before the end of a run, and the stages' shares of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sparsefit.errors import ConfigError
from sparsefit.settings import number

STAGES = ("reconstruction", "training")
"""The stages that a budget can be split between, in the order in which they run."""


class Allowance:
    """A number of GPU-hours, what of them is kept for the end of the run, and what is spent.

    `spent` and `limit` are what all ranks agreed on last, so that each comes to the same decision.

    Args:
        gpu_hours: The whole budget.
        reserve: Share of it that is kept for the end at least.
        split: Shares of the stages, by name, as `check_split` takes them.

    Raises:
        ConfigError: When an argument is out of range.
    """

    def __init__(self, gpu_hours: float, reserve: float = 0.05, split: Mapping[str, float] | None = None) -> None:
        self.gpu_hours = float(number("gpu_hours", gpu_hours, above=0))
        self.reserve = float(number("reserve, a share of the budget,", reserve, least=0, below=1))
        self.split = None if split is None else check_split(split)
        self.kept: dict[str, float] = {}
        """Wall seconds kept on this rank for what follows training, by name."""
        self.ends: dict[str, float] = {}
        """GPU-hours at which the share of a stage is used up, for the stages that asked."""
        self.spent = 0.0
        self.limit = self.gpu_hours

    def keep(self, seconds: float, what: str) -> None:
        """Keep wall seconds for what follows training; the same name again replaces its seconds."""
        self.kept[what] = float(number(f"what is kept for {what}, in seconds,", seconds, least=0))

    def reserve_hours(self, kept_hours: float, validation_hours: float) -> float:
        """GPU-hours that training must leave: the reserve or what is kept, whichever is more, and a validation."""
        return max(self.reserve * self.gpu_hours, kept_hours) + validation_hours

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
        end = self.ends.setdefault(stage, self.spent + self.split.get(stage, 0.0) * left)
        return min(left, max(0.0, end - self.spent))

    def refusal(self, what: str, hours: float) -> str:
        """Why `what` cannot be paid for, and the way out."""
        estimate = f", and {what} needs about {hours:.4g} more" if hours else ""
        return (
            f"The budget of {self.gpu_hours:.4g} GPU-hours cannot pay for {what}: {self.spent:.4g} are spent and "
            f"{self.gpu_hours - self.limit:.4g} are kept for the final evaluation and export{estimate}. "
            "Raise gpu_hours, take fewer calibration samples, or make them shorter."
        )

    def exhausted(self, steps: int, hours: float) -> str:
        """Why training stops after `steps` steps, where the next takes `hours`."""
        return (
            f"{self.spent:.4g} of {self.gpu_hours:.4g} GPU-hours are spent after {steps} steps, "
            f"{self.gpu_hours - self.limit:.4g} are kept for the closing validation, evaluation and export"
            + (f", and the next step may take {hours:.4g}" if hours else "")
        )


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
    for name, share in split.items():
        number(f"the split's share for {name}", share, least=0)
    total = sum(split.values())
    if abs(total - 1) > 1e-6:
        shares = " + ".join(f"{name} {share:g}" for name, share in split.items()) or "no share at all"
        raise ConfigError(
            f"The shares of split add up to {total:.6g}, not to 1: {shares}. They are shares of what is left when the "
            f"model is pruned. Make them add up to 1, as in {example}, or leave split out."
        )
    return {name: float(share) for name, share in split.items()}


def _names(names: Iterable[object]) -> str:
    return " and ".join(map(repr, names))
