"""Sends calibration batches through the model of a LightningModule that was not written for calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from sparsefit.errors import CalibrationError

_CALLS = 3
"""How often a step may call its model (two towers, several views); more calls count as generation."""

_HOW = (
    "Give the module a forward or a predict_step that takes such a batch, or a calibration_step(self, batch), which "
    "is tried before all other methods: it calls the model with the inputs in the batch"
)


class ModelCall:
    """Sends batches, already on the right device, through the model of a module.

    The first method that accepts the first batch is used for all batches. A module's `calibration_step(batch)` is the
    only candidate if there is one. Otherwise these are tried in order: `predict_step`, unless it generates; `forward`,
    if the batch maps to its arguments without ambiguity; `training_step` without logging, except with manual
    optimization; `forward` with an ambiguous mapping.

    Args:
        module: The module, in evaluation mode whenever this is called.

    Attributes:
        name: Name of the method in use; None before the first batch.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._way: Callable[[Any], Any] | None = None
        self.name: str | None = None

    def __call__(self, batch: Any) -> Any:
        """Send a batch through the model.

        Raises:
            CalibrationError: if none of the methods accepts the first batch.
        """
        return self._choose(batch) if self._way is None else self._way(batch)

    def _choose(self, batch: Any) -> Any:
        failures: list[tuple[str, BaseException]] = []
        ways = _ways(self._module, batch)
        for name, way in ways:
            only_predicts = name == "predict_step" and len(ways) > 1
            try:
                if only_predicts:
                    with _generation_refused(self._module):
                        output = way(batch)
                else:
                    output = way(batch)
            except torch.OutOfMemoryError:
                raise
            except (Exception, _Generates) as error:
                failures.append((name, error))
                continue
            self._way, self.name = way, name
            return output
        raise CalibrationError(_describe(self._module, batch, failures)) from (failures[-1][1] if failures else None)


def _ways(module: LightningModule, batch: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    """The methods that may accept a batch, in the order in which they are tried."""
    own_step = getattr(module, "calibration_step", None)
    if callable(own_step):
        return [("calibration_step", own_step)]
    ways: list[tuple[str, Callable[[Any], Any]]] = []
    if is_overridden("predict_step", module):
        ways.append(("predict_step", lambda given: module.predict_step(given, 0)))
    forward = [("forward", lambda given: _call_forward(module, given))]
    if type(module).forward in (LightningModule.forward, nn.Module.forward):
        forward = []
    doubtful = bool(forward) and _leaves_out(module, batch)
    ways += [] if doubtful else forward
    if is_overridden("training_step", module) and module.automatic_optimization:
        ways.append(("training_step", lambda given: _train_step(module, given)))
    return ways + (forward if doubtful else [])


def _call_forward(module: LightningModule, batch: Any) -> Any:
    """Call `forward` with the part of a labelled batch that it accepts: x of (x, y), of a mapping the named inputs."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    takes_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(batch, Mapping) and (takes_any_name or set(named) & set(batch)):
        return module(**{key: value for key, value in batch.items() if takes_any_name or key in named})
    if isinstance(batch, list | tuple):
        required = sum(p.default is p.empty for p in _positional(parameters))
        if required == 1:
            return module(batch[0])
        if required == len(batch):
            return module(*batch)
    return module(batch)


def _leaves_out(module: LightningModule, batch: Any) -> bool:
    """Whether part of the batch, such as a mask, would be dropped although an optional parameter of `forward` may be
    meant for it."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    optional = {p.name for p in parameters if p.default is None}
    if isinstance(batch, Mapping):
        named = {p.name for p in parameters}
        takes_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return not takes_any_name and bool(optional - set(batch)) and bool(set(batch) - named)
    return isinstance(batch, list | tuple) and len(batch) > 1 and bool(optional)


def _positional(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _train_step(module: LightningModule, batch: Any) -> Any:
    parameters = inspect.signature(module.training_step).parameters.values()
    names = [p.name for p in parameters]
    if "dataloader_iter" in names:
        raise CalibrationError("it takes batches from a loader by itself")
    further = [0] if len(_positional(list(parameters))) > 1 else []
    # Metrics of torchmetrics that have no updates yet; those of this call are discarded below.
    counting = [part for part in module.modules() if getattr(part, "update_called", None) is False]
    try:
        with _not_logging(module):
            return module.training_step(batch, *further)
    finally:
        for metric in counting:
            metric.reset()


@contextmanager
def _not_logging(module: LightningModule) -> Iterator[None]:
    """Replace `log` and `log_dict` by no-ops, as Lightning allows logging only inside its loops."""
    with _attributes(module, {name: lambda *_, **__: None for name in ("log", "log_dict")}):
        yield


class _Generates(BaseException):
    """Raised when a step generates. Not an `Exception`, which the step might catch."""


@contextmanager
def _generation_refused(module: LightningModule) -> Iterator[None]:
    """Raise `_Generates` if `generate` is called, or a submodule with most of the weights is called repeatedly."""
    calls: dict[int, int] = {}

    def generate(*_: Any, **__: Any) -> None:
        raise _Generates("it generates: what it makes up would be calibrated on")

    def count(part: nn.Module, *_: Any) -> None:
        calls[id(part)] = calls.get(id(part), 0) + 1
        if calls[id(part)] > _CALLS:
            raise _Generates(f"it calls its model more than {_CALLS} times, as a loop does that generates")

    size = sum(parameter.numel() for parameter in module.parameters())
    parts = [part for part in module.modules() if part is not module]
    greater = [part for part in parts if 2 * sum(p.numel() for p in part.parameters()) > size]
    generating = [part for part in parts if callable(getattr(part, "generate", None))]
    handles = [part.register_forward_pre_hook(count) for part in greater]
    try:
        with _all_attributes(generating, {"generate": generate}):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _all_attributes(owners: list[nn.Module], values: Mapping[str, Any]) -> Iterator[None]:
    if not owners:
        yield
        return
    with _attributes(owners[0], values), _all_attributes(owners[1:], values):
        yield


@contextmanager
def _attributes(owner: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Replace attributes of a module temporarily."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(owner).pop(name)
        vars(owner).update(before)


def _describe(module: LightningModule, batch: Any, failures: list[tuple[str, BaseException]]) -> str:
    name = type(module).__name__
    if not failures:
        return (
            f"{name} has no forward, no predict_step and no training_step (of automatic optimization), so calibration "
            f"cannot call its model. {_HOW}"
        )
    if isinstance(batch, Mapping):
        form = f"a mapping with the keys {', '.join(map(str, batch))}"
    elif isinstance(batch, list | tuple):
        form = f"{len(batch)} values"
    else:
        form = type(batch).__name__
    reasons = "; ".join(f"{way}: {' '.join(f'{type(e).__name__}: {e}'.split())}" for way, e in failures)
    return f"calibration cannot send a batch of {form} through the model of {name} ({reasons}). {_HOW}"
