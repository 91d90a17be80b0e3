"""Settings of datamodules that count something, or draw."""

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


def check_writing(settings: Mapping[str, Any]) -> None:
    """Refuses settings of text that a model is to write which cannot work.

    Raises:
        ConfigError: naming the setting.
    """
    check_counts(settings, ("train_tokens", "writing_batch_size", "prompt_tokens"), ())
    first_tokens = settings["first_tokens"]
    if not isinstance(first_tokens, int) or first_tokens < 0:
        raise ConfigError(
            f"first_tokens is {first_tokens!r}: it must be a whole number, 0 to draw the first token, too"
        )
    if first_tokens and settings["prompts"] is not None:
        raise ConfigError("windows begin with prompts or with the likeliest first_tokens, not with both: leave one out")
    if not settings["temperature"] > 0:
        raise ConfigError(f"temperature is {settings['temperature']!r}: it must be above 0")
    if not 0 < settings["top_p"] <= 1:
        raise ConfigError(f"top_p is {settings['top_p']!r}: it must be above 0 and at most 1")
    if settings["train_source"] is not None and settings["calibration_source"] is not None:
        raise ConfigError(
            "train_source and calibration_source both name real text, so the model has nothing to write: use "
            "TextDataModule, or leave one of them out"
        )
