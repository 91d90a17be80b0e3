"""The run's report: a plain dict, its file `report.json`, and pure functions that read values from it.

Anything may be missing from a report, for example if a run was interrupted: it is read as `None` or an empty container.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsefit.errors import RunFolderError
from sparsefit.files import is_sealed, sealed, write_text

CONTROL = "control"  # the dense model trained with the recipe of the run
STAGES = ("dense", "pruned", "recovered")  # the stages that `share_won_back` compares
ALL_STAGES = ("dense", "pruned", "reconstructed", "recovered", "merged", CONTROL)  # stages that may be measured
_METRICS = {"perplexity": "lower", "accuracy": "higher"}
_RUN_ORDER = ("setup", "calibration and pruning", "reconstruction", "training", "validation", "evaluation")
_RUN_ORDER += ("zero-shot tasks", "export", "closing", "merge")
# Names that several layers of a block have (attn.c_proj and mlp.c_proj of GPT-2): they need the path before them.
_SHARED_NAMES = frozenset({"c_proj", "dense", "proj", "linear"})


def write_json(report: Mapping[str, Any], path: str | os.PathLike[str], seal: bool = False) -> Path:
    """Write a report atomically as strict JSON, sorted by key; returns the path written.

    NaN and infinities become null; tensors and arrays become numbers and lists; paths, dtypes and other objects become
    strings. With `seal` a checksum is included, with which `read_json` detects changes.

    Raises:
        RunFolderError: The file cannot be written. An older file at `path` is then unchanged.
    """
    strict = sealed(_strict(report)) if seal else _strict(report)
    text = json.dumps(strict, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(text, path)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a report that `write_json` wrote.

    Raises:
        RunFolderError: There is no such file, it does not hold a JSON object, or its checksum is wrong.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error}. Name the report.json inside a run folder.") from error
    except ValueError as error:
        raise RunFolderError(f"{path} is not a report: {error}. Name a report.json that sparsefit wrote.") from error
    if not isinstance(report, dict):
        raise RunFolderError(f"{path} is not a report: no JSON object. Name a report.json that sparsefit wrote.")
    if not is_sealed(report):
        raise RunFolderError(f"{path} is not what was written: it is damaged, or was changed since.")
    return report


def _strict(value: Any) -> Any:
    """The value in JSON's own types, without NaN and infinities."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_strict(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if callable(getattr(value, "tolist", None)):
        return _strict(value.tolist())
    return str(value)


def number(value: Any) -> float | None:
    """The value as a finite float; None if it is not a finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def section(report: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping under a path of keys, e.g. `section(report, "gpu_hours", "stages")`; empty if there is none."""
    found: Any = report
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def items(report: Mapping[str, Any], *keys: str) -> list[Any]:
    """The list under a path of keys; empty if there is none."""
    found = section(report, *keys[:-1]).get(keys[-1])
    return list(found) if isinstance(found, (list, tuple)) else []


def entries(report: Mapping[str, Any], *keys: str) -> list[Mapping[str, Any]]:
    """The mappings in the list under a path of keys."""
    return [entry for entry in items(report, *keys) if isinstance(entry, Mapping)]


def metrics(report: Mapping[str, Any]) -> dict[str, str]:
    """The report's metrics, and whether "lower" or "higher" is better."""
    declared = section(report, "metrics") or {name: way for name, way in _METRICS.items() if section(report, name)}
    return {str(name): str(way) for name, way in declared.items()}


def metric_values(report: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The measured values of a metric by stage, in the order of `ALL_STAGES`, without the missing ones."""
    values = {stage: number(section(report, metric).get(stage)) for stage in ALL_STAGES}
    return {stage: value for stage, value in values.items() if value is not None}


class Moment(NamedTuple):
    """A metric's value at one moment of a run."""

    stage: str
    hours: float
    step: float | None
    value: float


def timeline(report: Mapping[str, Any], metric: str) -> list[Moment]:
    """A metric's values over the run, sorted by GPU-hours spent; empty if the report has no timeline.

    The stages are those of `ALL_STAGES`, measured on the test data, and "validation", measured on the validation data.
    """
    moments = []
    for entry in entries(report, "timeline"):
        hours, value = number(entry.get("gpu_hours")), number(entry.get("value"))
        if entry.get("metric") == metric and hours is not None and value is not None:
            moments.append(Moment(str(entry.get("stage") or "?"), hours, number(entry.get("step")), value))
    return sorted(moments, key=lambda moment: moment.hours)


def distance(metric: str, value: float | None, reference: float | None) -> float | None:
    """How far a value lies above a reference: ln value - ln reference (nats) for perplexities, else the difference."""
    if value is None or reference is None:
        return None
    if "perplexity" not in metric:
        return value - reference
    return math.log(value) - math.log(reference) if min(value, reference) > 0 else None


def nats_lost(report: Mapping[str, Any], metric: str, moment: Moment) -> float | None:
    """Nats per token by which a perplexity is above the dense model's; None for validations, which use other text."""
    stages = {moment.stage: moment.value for moment in timeline(report, metric)} | metric_values(report, metric)
    if "perplexity" not in metric or moment.stage == "validation":
        return None
    return distance(metric, moment.value, stages.get("dense"))


def block_errors(report: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The errors of each block's outputs before and after the reconstruction, for blocks with both."""
    blocks = entries(report, "reconstruction", "blocks")
    pairs = [(number(block.get("before")), number(block.get("after"))) for block in blocks]
    return [(before, after) for before, after in pairs if before is not None and after is not None]


def share_won_back(
    dense: float | None,
    pruned: float | None,
    recovered: float | None,
    metric: str = "perplexity",
    better: str = "lower",
) -> float | None:
    """The share of the quality lost by pruning that recovery won back: 0 is none, 1 is all, above 1 beats dense.

    Perplexity is the exponential of a loss, so metrics with "perplexity" in their name are compared by logarithms:
    (ln pruned - ln recovered) / (ln pruned - ln dense). None if a value is missing or infinite, or nothing was lost.
    """
    known = [value for value in map(number, (dense, pruned, recovered)) if value is not None]
    if len(known) < 3 or ("perplexity" in metric and min(known) <= 0):
        return None
    known = [math.log(value) for value in known] if "perplexity" in metric else known
    start, low, end = known if better == "lower" else [-value for value in known]
    return (low - end) / (low - start) if low > start else None


def won_back(report: Mapping[str, Any], metric: str) -> float | None:
    """`share_won_back` of one of the report's metrics."""
    values = metric_values(report, metric)
    return share_won_back(*(values.get(stage) for stage in STAGES), metric, metrics(report).get(metric, "lower"))


def distance_from_control(report: Mapping[str, Any], metric: str) -> float | None:
    """How much the recovered model's value is above the control's. Both were trained in the same way, so this is the
    cost of the masks.

    >>> report = {"metrics": {"accuracy": "higher"}, "accuracy": {"recovered": 0.75, "control": 1.0}}
    >>> distance_from_control(report, "accuracy")
    -0.25
    """
    values = metric_values(report, metric)
    return distance(metric, values.get("recovered"), values.get(CONTROL))


def control_harmed(report: Mapping[str, Any]) -> list[str]:
    """The metrics in which the control is worse than the dense model: the recipe made it worse, so the recovered model
    must be compared with the dense model instead.

    >>> control_harmed({"metrics": {"perplexity": "lower"}, "perplexity": {"dense": 20.0, "control": 25.0}})
    ['perplexity']
    """
    worse = []
    for metric, way in metrics(report).items():
        values = metric_values(report, metric)
        dense, control = values.get("dense"), values.get(CONTROL)
        if dense is not None and control is not None and (control > dense if way == "lower" else control < dense):
            worse.append(metric)
    return worse


def _path(name: str) -> list[str]:
    """The segments of a name, without the parameter name `weight` and PEFT's `base_layer`."""
    parts = [part for part in name.split(".") if part != "base_layer"]
    return parts[:-1] if len(parts) > 1 and parts[-1] == "weight" else parts


def layer_type(name: str) -> str:
    """The type of a layer inside its block: `model.layers.0.self_attn.q_proj.weight` is a `q_proj`.

    Ambiguous names keep their path inside the block (`attn.c_proj` and `mlp.c_proj` of GPT-2), numbered ones the name
    of their container (`net.0`).
    """
    parts = _path(name)
    if parts[-1].isdigit():
        return ".".join(parts[-2:])
    if parts[-1] not in _SHARED_NAMES:
        return parts[-1]
    start = max((index + 1 for index, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[start:])


def block_of(name: str) -> tuple[str, tuple[int, ...]] | None:
    """The numbered block of a layer: the path to the blocks and the index; None outside any block.

    `model.layers.3.mlp.up_proj.weight` is in ("model.layers", (3,)); for blocks in stages
    (`stages.1.blocks.0.mlp.fc1`) the index is (1, 0). A number at the end of the name is a layer's, not a block's.
    """
    parts = _path(name)
    first = next((index for index, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if first is None:
        return None
    nested = re.match(r"(?:(?:blocks|layers)\.)?(\d+)\.", ".".join(parts[first + 1 :]))
    index = (int(parts[first]), int(nested[1])) if nested else (int(parts[first]),)
    return ".".join(parts[:first]), index


def layer_sparsity(layer: Mapping[str, Any]) -> float | None:
    """The share of zeros of a layer, or of all layers of a type."""
    weights, zeros = number(layer.get("weights")), number(layer.get("zeros"))
    if weights and zeros is not None:
        return zeros / weights
    return number(layer.get("sparsity"))


def sparsity_by_type(report: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The layers of a report summed by type, in order of first appearance: {type: {layers, weights, zeros}}."""
    types: dict[str, dict[str, int]] = {}
    for layer in entries(report, "sparsity", "layers"):
        entry = types.setdefault(layer_type(str(layer.get("name", "?"))), {"layers": 0, "weights": 0, "zeros": 0})
        entry["layers"] += 1
        for key in ("weights", "zeros"):
            entry[key] += int(number(layer.get(key)) or 0)
    return types


def stages(report: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(stage, seconds, GPU-hours) of each stage, in the order of a run."""
    seconds, hours = section(report, "seconds", "stages"), section(report, "gpu_hours", "stages")
    names = list(dict.fromkeys([*hours, *seconds]))
    names.sort(key=lambda name: _RUN_ORDER.index(name) if name in _RUN_ORDER else len(_RUN_ORDER))
    return [(name, number(seconds.get(name)), number(hours.get(name))) for name in names]
