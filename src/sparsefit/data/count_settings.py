"""Settings of datamodules that count something, or draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsefit.errors import ConfigError
from sparsefit.settings import number


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
        if not (settings[name] is None and name in optional):
            number(name, settings[name], least=1, whole=True)
    number("num_workers", settings["num_workers"], least=0, whole=True)
    if "seed" in settings:
        number("seed", settings["seed"], least=0, whole=True)


def check_writing(settings: Mapping[str, Any]) -> None:
    """Refuses settings of text that a model is to write which cannot work.

    Raises:
        ConfigError: naming the setting.
    """
    check_counts(settings, ("train_tokens", "writing_batch_size", "prompt_tokens"), ())
    first_tokens = settings["first_tokens"]
    number("first_tokens", first_tokens, least=0, whole=True)
    if first_tokens and settings["prompts"] is not None:
        raise ConfigError("windows begin with prompts or with the likeliest first_tokens, not with both: leave one out")
    number("temperature", settings["temperature"], above=0)
    number("top_p", settings["top_p"], above=0, most=1)
    if settings["train_source"] is not None and settings["calibration_source"] is not None:
        raise ConfigError(
            "train_source and calibration_source both name real text, so the model has nothing to write: use "
            "TextDataModule, or leave one of them out"
        )
