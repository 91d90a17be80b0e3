"""Checks of data module settings that are counts or seeds, and of the settings of generated text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsefit.errors import ConfigError
from sparsefit.settings import number


def check_counts(settings: Mapping[str, Any], counts: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Check that counts are at least 1, and that `num_workers` and `seed` are not negative.

    Args:
        settings: the settings by name.
        counts: names of counts that are required.
        optional: names of counts that may be None.

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
    """Check the settings of text that a model is to generate.

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
