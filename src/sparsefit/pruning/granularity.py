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
    """

    axis: str
    size: int = 1

    @classmethod
    def parse(cls, value: object) -> Granularity:
        """Read "output", "input", "layer", "variant", ("output", 128), "(output, 128)" or "output:128".

        >>> Granularity.parse("input:4")
        Granularity(axis='input', size=4)
        """
        if isinstance(value, Granularity):
            return value
        axis, sized = None, []
        if isinstance(value, str) and (match := SPELLING.fullmatch(value.strip())):
            axis, *numbers = filter(None, match.groups())
            sized = [int(number) for number in numbers]
        elif isinstance(value, tuple | list) and len(value) == 2:
            axis, *sized = value
        if axis not in (AXES[:2] if sized else AXES) or not all(type(size) is int and size > 0 for size in sized):
            raise ConfigError(
                f"unknown granularity {value!r}; the choices are 'output', 'input', 'layer', 'variant', and groups of "
                "k rows ('output', k) or of k columns ('input', k), where k is a whole number from 1 on"
            )
        return cls(axis, *sized)

    def __str__(self) -> str:
        return self.axis if self.size == 1 else f"({self.axis}, {self.size})"
