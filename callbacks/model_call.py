"""How a batch reaches the model in a LightningModule that knows nothing of calibration."""

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
"""How often a step may call its model (two towers, several views) until it is taken to generate."""

_HOW = (
    "Give the module a forward or a predict_step that takes such a batch, or a calibration_step(self, batch), which "
    "comes before all others: it calls the model with what of the batch belongs there"
)


class ModelCall:
    """Sends batches that are on their device through the model of a module.

    The first of these that takes the first batch takes all: the module's `calibration_step(batch)`; if it has none, its
    `predict_step`, unless that generates; its `forward`, with what of the batch goes there without doubt; its
    `training_step`, without logging (of manual optimization, it is left alone); its `forward` with what may go there.

    Args:
        module: The module, in evaluation mode whenever this is called.

    Attributes:
        name: What takes the batches, once that is known.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._way: Callable[[Any], Any] | None = None
        self.name: str | None = None

    def __call__(self, batch: Any) -> Any:
        """Send a batch through the model.

        Raises:
            CalibrationError: if none of its methods takes the first batch.
        """
        return self._choose(batch) if self._way is None else self._way(batch)

    def _choose(self, batch: Any) -> Any:
        failures: list[tuple[str, BaseException]] = []
        ways = _ways(self._module, batch)
        for name, way in ways:
            only_predicts = name == "predict_step" and len(ways) > 1
            try:
                if only_predicts:
                    with _generating_told(self._module):
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
    """What can take a batch, the best first."""
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
    """A labelled batch is reduced to what `forward` takes: (x, y) to x, a mapping to its arguments."""
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
    """Whether `forward` has parameters, None by default, for which something in the batch may be meant that would not
    get there: a mask, for one."""
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
    # Metrics of torchmetrics, that have counted nothing yet.
    counting = [part for part in module.modules() if getattr(part, "update_called", None) is False]
    try:
        with _not_logging(module):
            return module.training_step(batch, *further)
    finally:
        for metric in counting:
            metric.reset()


@contextmanager
def _not_logging(module: LightningModule) -> Iterator[None]:
    """Lightning logs in its loops only."""
    with _attributes(module, {name: lambda *_, **__: None for name in ("log", "log_dict")}):
        yield


class _Generates(BaseException):
    """A step generates (no `Exception`: the step may catch these)."""


@contextmanager
def _generating_told(module: LightningModule) -> Iterator[None]:
    """Raise `_Generates` where a model is told to generate, or its greater part is called again and again."""
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
    """Other methods in the place of an object's own, for a while."""
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
