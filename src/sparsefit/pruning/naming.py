"""How a configuration speaks of layers: their names, and patterns for these."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

REGEX = "re:"
"""What a pattern that is a regular expression begins with."""


def layer_name(weight_name: str) -> str:
    """The name by which a configuration speaks of a weight: without ".weight" and without an expert's number.

    >>> layer_name("0.fc.weight"), layer_name("0.experts.down_proj[3]")
    ('0.fc', '0.experts.down_proj')
    """
    return re.sub(r"\[\d+\]$", "", weight_name).removesuffix(".weight")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's name fits one of the patterns.

    Args:
        name: The layer's name.
        patterns: Each is one or more consecutive parts of a name, so that it means a layer ("q_proj", "mlp.down_proj")
            as well as everything in a module ("vision_tower", "layers.0"); or a glob ("*.experts.*", "layers.[0-3].*");
            or, after "re:", a regular expression that is searched for in the name.

    >>> matches("model.layers.0.q_proj", ["q_proj"]), matches("model.layers.0.q_proj", ["proj"])
    (True, False)
    >>> [matches("model.vision.layers.0.fc1", [pattern]) for pattern in ("vision", "layers.*.fc?", r"re:\.fc\d$")]
    [True, True, True]
    """
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith(REGEX):
        return re.search(pattern.removeprefix(REGEX), name) is not None
    if set(pattern) & set("*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return f".{pattern}." in f".{name}."
