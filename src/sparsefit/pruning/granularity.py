"""Which weights of a matrix compete with each other."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsefit.errors import ConfigError

AXES = ("output", "input", "layer", "variant")
SPELLING = re.compile(r"(\w+)|(\w+)\s*:\s*(\d+)|[(\[]\s*['\"]?(\w+)['\"]?\s*,\s*(\d+)\s*[)\]]")


@dataclass(frozen=True)
class Granularity:
    """Which weights of an (out, in) matrix compete with each other (arXiv 2306.11695, Table 5).

    Args:
        axis: "output": `size` consecutive rows with all their inputs; "input": `size` consecutive columns with all
            their outputs; "layer": the whole matrix; "variant": each row, by a share of the sum of its scores
            (`use_variant` in the paper's code).
        size: Rows or columns of one group; the last group is smaller where they do not divide evenly.

    Raises:
        ConfigError: for an unknown axis, a size that is not a whole number from 1 on, or a size with an axis that
            takes none.

    >>> str(Granularity("output", 128))
    '(output, 128)'
    """

    axis: str
    size: int = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.size, int) and not isinstance(self.size, bool)
        if self.axis not in AXES or not whole or self.size < 1 or (self.size > 1 and self.axis in AXES[2:]):
            raise _not_a_granularity((self.axis, self.size))

    @classmethod
    def parse(cls, value: object) -> Granularity:
        """Read "output", "input", "layer", "variant", ("output", 128), "(output, 128)" or "output:128".

        Raises:
            ConfigError: for anything else; the message names the choices.

        >>> Granularity.parse("input:4")
        Granularity(axis='input', size=4)
        """
        if isinstance(value, Granularity):
            return value
        if isinstance(value, str) and (match := SPELLING.fullmatch(value.strip())):
            axis, *sized = (group for group in match.groups() if group is not None)
            sized = [int(size) for size in sized]
        elif isinstance(value, tuple | list) and len(value) == 2:
            axis, sized = value[0], [value[1]]
        else:
            raise _not_a_granularity(value)
        if axis not in (AXES[:2] if sized else AXES):
            raise _not_a_granularity(value)
        return cls(axis, *sized)

    def __str__(self) -> str:
        return self.axis if self.size == 1 else f"({self.axis}, {self.size})"


def _not_a_granularity(value: object) -> ConfigError:
    return ConfigError(
        f"unknown granularity {value!r}; the choices are 'output', 'input', 'layer', 'variant', and groups of k rows "
        "('output', k) or of k columns ('input', k), where k is a whole number from 1 on"
    )
