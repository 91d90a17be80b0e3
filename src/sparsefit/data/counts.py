"""Settings of datamodules that count something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsefit.errors import ConfigError


def check_counts(settings: Mapping[str, Any], counts: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Refuses counts below 1, and a negative `num_workers`.

    Args:
        settings: by their names.
        counts: names of those that must be there.
        optional: names of those that may be None.

    Raises:
        ConfigError: naming the setting.
    """
    for name in (*counts, *optional):
        value = settings[name]
        if not (value is None and name in optional) and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} is {value!r}: it must be a whole number of at least 1")
    if settings["num_workers"] < 0:
        raise ConfigError(f"num_workers is {settings['num_workers']}: it must be 0 or more")
