"""Checks whether a module matches a checkpoint, and which of its settings differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparsefit.errors import ConfigError

_SHOWN = 3
_DECISIVE = ("model", "adapter")
_DECISIVE_IN_TRAINING = (*_DECISIVE, "distill", "optimizer")
_FREE = ("adapter.dropout",)


def changed_settings(checkpoint: Mapping[str, Any], module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The hyperparameters that a checkpoint and a module both have with different values: dotted name -> (value in the
    checkpoint, value in the module)."""
    now, saved = getattr(module, "hparams", {}), checkpoint.get("hyper_parameters") or {}
    return _changed(_plain(saved), _plain(now))


def check_same_recipe(checkpoint: Mapping[str, Any], module: nn.Module, path: str | Path, training: bool) -> None:
    """Check that a module has the weights and the recipe of a checkpoint.

    Args:
        checkpoint: The checkpoint as it was read, before it is completed.
        module: The module.
        path: The path it was read from, for the message.
        training: Whether training resumes; if not, training settings may differ.

    Raises:
        ConfigError: if model, adapters, distillation or optimizer class differ; names the settings.
    """
    differing = changed_settings(checkpoint, module)
    held, state = checkpoint["state_dict"], module.state_dict()
    left_out = (checkpoint["sparsefit"]["base"] or {}).get("entries", {})
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    problems = []
    if getattr(module, "strict_loading", True):
        problems += [f"{name} is not in the checkpoint" for name in trained if name not in held | left_out]
        problems += [f"{key} is not in the model" for key in [*held, *left_out] if key not in state]
    problems += [
        f"{name} is {tuple(held[name].shape)} in the checkpoint and {tuple(parameter.shape)} in the model"
        for name, parameter in trained.items()
        if name in held and held[name].shape != parameter.shape
    ]
    # Other settings, such as the learning rate or dropout, may change when a run resumes.
    sections = _DECISIVE_IN_TRAINING if training else _DECISIVE
    decisive = {name: both for name, both in differing.items() if name.split(".")[0] in sections and name not in _FREE}
    if not problems and not decisive:
        return
    listed = ", ".join(
        f"{key} was {was!r} and is {is_!r}" for key, (was, is_) in sorted((decisive or differing).items())
    )
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ConfigError(
        f"the checkpoint {path} is from another recipe: {'; '.join(filter(None, [listed, *problems[:_SHOWN]]))}{more}. "
        "Resume with the settings of its run (config.yaml in the run folder), or start a new run in another folder"
    )


def _changed(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    changed: dict[str, tuple[Any, Any]] = {}
    for key in saved.keys() & now.keys():
        was, is_ = saved[key], now[key]
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            changed |= _changed(was, is_, f"{prefix}{key}.")
        elif was != is_:
            changed[prefix + key] = was, is_
    return changed


def _plain(values: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Settings as plain values; of a model's path only the last part, as folders may be moved."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            plain[key] = _plain(value, depth + 1)
        elif key == "model" and not depth:
            plain[key] = Path(str(value)).name
        elif isinstance(value, tuple | list | str | int | float | None):  # other types may not be comparable
            plain[key] = list(value) if isinstance(value, tuple) else value
    return plain
