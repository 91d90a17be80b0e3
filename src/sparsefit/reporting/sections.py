"""The sections of a report's page below its figures: tables of what was done, what it cost and what came of it.

Each function returns one card, or an empty text where the report does not hold what it is about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sparsefit.reporting import formats as _formats
from sparsefit.reporting import report as _report
from sparsefit.reporting.markup import MISSING, as_facts, as_table, as_text, card

_MOST_VALIDATIONS = 8
_MOST_BLOCKS = 12


def timeline(report: Mapping[str, Any]) -> str:
    """Quality against GPU-hours: a row for each stage, and for some of the validations."""
    bodies = []
    for metric in _report.metrics(report):
        moments = _report.timeline(report, metric)
        if not moments:
            continue
        shown = _thinned(moments)
        with_nats = "perplexity" in metric
        rows = []
        for moment in shown:
            lost = _report.nats_lost(report, metric, moment)
            nats = [f"{lost:+.3f}" if lost is not None else MISSING] if with_nats else []
            spent, step = _formats.hours(moment.hours), _formats.count(moment.step)
            rows.append((escape(moment.stage), spent, step, _formats.metric(metric, moment.value), *nats))
        columns = ("stage", "GPU-hours", "step", escape(metric), *(["nats lost"] if with_nats else []))
        notes = ["nats lost: ln of the perplexity, less that of the dense model."] if with_nats else []
        if any(moment.stage == "validation" for moment in shown):
            notes.append("Validations are measured on the validation data, all else on the test data.")
        if len(shown) < len(moments):
            notes.append(f"{len(moments) - len(shown)} more validations are in the figure and in report.json.")
        bodies.append(as_table(columns, rows) + (f'<p class="muted small">{" ".join(notes)}</p>' if notes else ""))
    return card("Quality against GPU-hours", "".join(bodies))


def _thinned(moments: Sequence[_report.Moment]) -> list[_report.Moment]:
    """All stages, and at most `_MOST_VALIDATIONS` of the validations, evenly spread, the last of them included."""
    validations = [index for index, moment in enumerate(moments) if moment.stage == "validation"]
    count = len(validations)
    most = min(count, _MOST_VALIDATIONS)
    kept = {validations[(count * (number + 1)) // most - 1] for number in range(most)}
    return [moment for index, moment in enumerate(moments) if moment.stage != "validation" or index in kept]


def types(report: Mapping[str, Any]) -> str:
    """Zeros of each type of layer."""
    rows = [
        (
            f"<code>{escape(name)}</code>",
            *(_formats.count(entry.get(key)) for key in ("layers", "weights", "zeros")),
            _formats.percent(_report.layer_sparsity(entry)),
        )
        for name, entry in _report.sparsity_by_type(report).items()
    ]
    sparsity = _report.section(report, "sparsity")
    layers = len(_report.items(report, "sparsity", "layers")) or None
    counts = (_formats.count(count) for count in (layers, sparsity.get("weights"), sparsity.get("zeros")))
    total = ("all pruned", *counts, _formats.percent(_report.number(sparsity.get("total"))))
    columns = ("layers", "count", "weights", "zeros", "sparsity")
    return card("Sparsity by layer type", as_table(columns, rows, total) if rows else "")


def layers(report: Mapping[str, Any]) -> str:
    """Zeros of each layer, folded up."""
    layers = [layer for layer in _report.items(report, "sparsity", "layers") if isinstance(layer, Mapping)]
    if not layers:
        return ""
    rows = [
        (
            f"<code>{as_text(layer.get('name'))}</code>",
            escape(" x ".join(map(str, _report.items(layer, "shape")))) or MISSING,
            _formats.count(layer.get("weights")),
            _formats.count(layer.get("zeros")),
            _formats.percent(_report.layer_sparsity(layer)),
        )
        for layer in layers
    ]
    table = as_table(("layer", "shape (out x in)", "weights", "zeros", "sparsity"), rows)
    return f'<section class="card"><details><summary>All {len(layers)} layers</summary>{table}</details></section>'


def stages(report: Mapping[str, Any]) -> str:
    """Time and GPU-hours of each stage."""
    spent = _report.section(report, "gpu_hours")
    budget, total = _report.number(spent.get("budget")), _report.number(spent.get("total"))
    seconds = _report.number(_report.section(report, "seconds").get("total"))

    def cells(name: str, time: float | None, hours: float | None) -> tuple[str, ...]:
        share = [_formats.percent(None if hours is None else hours / budget, 1)] if budget else []
        return (escape(name), _formats.seconds(time), _formats.hours(hours), *share)

    rows = [cells(*stage) for stage in _report.stages(report)]
    if not rows and total is None and seconds is None:
        return ""
    columns = ("stage", "time", "GPU-hours", *(["of budget"] if budget else []))
    note = f'<p class="muted small">Budget: {_formats.hours(budget)} GPU-hours.</p>' if budget else ""
    return card("Time and GPU-hours", as_table(columns, rows, cells("total", seconds, total)) + note)


def pruning(report: Mapping[str, Any]) -> str:
    """How the model was pruned."""
    pruning = _report.section(report, "pruning")
    config = _report.section(pruning, "config")
    facts: list[tuple[str, Any]] = [(key, "none" if value is None else value) for key, value in config.items()]
    if pruning.get("update") not in (None, config.get("update")):
        facts.append(("order used", pruning["update"]))
    facts += [(f"calibration {key}", _formats.count(pruning[key])) for key in ("samples", "tokens") if pruning.get(key)]
    if _report.number(pruning.get("seconds")) is not None:
        facts.append(("time", _formats.seconds(_report.number(pruning["seconds"]))))
    errors = [e for e in map(_report.number, _report.section(pruning, "layer_errors").values()) if e is not None]
    if errors:
        facts.append(("error of a layer's outputs, mean", f"{sum(errors) / len(errors):.2%} of their square"))
    if pruning.get("digest"):
        facts.append(("digest of the masks", pruning["digest"]))
    body = as_facts(facts)
    notes = _report.items(pruning, "notes")
    if notes:
        body += f"<h3>Notes</h3><ul>{''.join(f'<li>{as_text(note)}</li>' for note in notes)}</ul>"
    left = _report.section(pruning, "left_dense")
    if left:
        body += f"<h3>Left dense</h3>{as_facts(left.items())}"
    return card("Pruning", body)


def reconstruction(report: Mapping[str, Any]) -> str:
    """The error of each block's outputs before and after it was tuned."""
    done = _report.section(report, "reconstruction")
    blocks = [block for block in _report.items(done, "blocks") if isinstance(block, Mapping)]
    known = [(key.replace("_", " "), done[key]) for key in done if key not in ("blocks", "seconds")]
    if _report.number(done.get("seconds")) is not None:
        known.append(("time", _formats.seconds(_report.number(done["seconds"]))))

    def error(value: float | None) -> str:
        return MISSING if value is None else f"{value:.3%}"

    rows = []
    for block in blocks:
        before, after = _report.number(block.get("before")), _report.number(block.get("after"))
        steps, seconds = _formats.count(block.get("steps")), _formats.seconds(_report.number(block.get("seconds")))
        name = f"<code>{as_text(block.get('block'))}</code>"
        rows.append((name, error(before), error(after), _ratio(before, after), steps, seconds))
    if not rows:
        return card("Reconstruction", as_facts(known))
    pairs = _report.block_errors(report)
    before, after = (sum(pair[side] for pair in pairs) / len(pairs) if pairs else None for side in (0, 1))
    total = ("mean", error(before), error(after), _ratio(before, after), "", "")
    errors = as_table(("block", "error before", "after", "left of it", "steps", "time"), rows, total)
    if len(rows) > _MOST_BLOCKS:
        short = as_table(("", "error before", "after", "left of it"), [total[:4]])
        errors = f"{short}<details><summary>All {len(rows)} blocks</summary>{errors}</details>"
    told = "Error: squared distance of a block's outputs from the dense model's, as a share of their square."
    return card("Reconstruction", f'{as_facts(known)}{errors}<p class="muted small">{told}</p>')


def _ratio(before: float | None, after: float | None) -> str:
    return f"{after / before:.1%}" if before and after is not None else MISSING


def merge(report: Mapping[str, Any]) -> str:
    """What merging the adapter into the base gave."""
    merged = _report.section(report, "merge")
    known: list[tuple[str, Any]] = []
    for key, value in merged.items():
        number = _report.number(value)
        if key == "sparsity" and number is not None:
            value = _formats.percent(number)
        elif key in _report.metrics(report) and number is not None:
            value = _formats.metric(key, number)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        known.append((str(key).replace("_", " "), value))
    return card("Merged model", as_facts(known))


def training(report: Mapping[str, Any]) -> str:
    """What recovery training came to."""
    training = _report.section(report, "training")
    history = [entry for entry in _report.items(training, "history") if isinstance(entry, Mapping)]
    losses = [loss for entry in history if (loss := _report.number(entry.get("loss"))) is not None]
    facts: list[tuple[str, Any]] = []
    if training.get("steps") is not None:
        facts.append(("steps", _formats.count(training["steps"])))
    if training.get("stop_reason"):
        facts.append(("stopped because", training["stop_reason"]))
    if training.get("trainable_parameters") is not None:
        facts.append(("trainable parameters", _formats.count(training["trainable_parameters"])))
    if losses:
        facts.append(("loss, first and last logged", f"{losses[0]:.4g}, {losses[-1]:.4g}"))
    return card("Recovery training", as_facts(facts))


def control(report: Mapping[str, Any]) -> str:
    """What the dense model, trained by the same recipe, came to."""
    done = _report.section(report, "control")
    if not done:
        return ""
    facts: list[tuple[str, Any]] = [("status", done.get("status"))]
    for metric in _report.metrics(report):
        values = _report.metric_values(report, metric)
        if _report.CONTROL in values:
            facts.append((metric, _formats.metric(metric, values[_report.CONTROL])))
            distance = _report.distance_from_control(report, metric)
            facts.append((f"recovered {metric} above it", _formats.distance(metric, distance)))
    facts.append(("steps", _formats.count(done.get("steps"))))
    facts.append(("GPU-hours", _formats.hours(_report.number(done.get("gpu_hours")))))
    facts.append(("time", _formats.seconds(_report.number(done.get("seconds")))))
    if done.get("error"):
        facts.append(("broken off by", done["error"]))
    told = "The dense model, trained by the same recipe: data, learning rates and steps as in the recovery, no masks"
    told += ", and on the labels alone, without the teacher" if done.get("without_teacher") else ""
    if harmed := _report.control_harmed(report):
        told += f". It made the dense model worse in {escape(', '.join(harmed))}: hold recovery against dense there"
    note = f'<p class="muted small">{told}. Its GPU-hours are no part of the run\'s.</p>'
    return card("Control", as_facts(facts) + note)


def configuration(report: Mapping[str, Any]) -> str:
    """The recipe, folded up."""
    configuration = report.get("configuration")
    if not configuration:
        return ""
    text = configuration if isinstance(configuration, str) else json.dumps(configuration, indent=2, default=str)
    return (
        f'<section class="card"><details><summary>Configuration</summary><pre>{escape(text)}</pre></details></section>'
    )


def surroundings(report: Mapping[str, Any]) -> str:
    """The machine and the versions."""
    facts = []
    for key, value in _report.section(report, "machine").items():
        size = _report.number(value) if key.endswith("_bytes") else None
        shown = _formats.size(size) if size is not None else value
        if isinstance(value, (list, tuple)):
            shown = ", ".join(map(str, value))
        facts.append((key.removesuffix("_bytes").replace("_", " "), shown))
    cards = card("Machine", as_facts(facts)) + card("Versions", as_facts(_report.section(report, "versions").items()))
    return f'<div class="grid">{cards}</div>' if cards else ""


DETAILS = (layers, pruning, reconstruction, training, merge, control, configuration, surroundings)
"""The sections of a report that stand one below the other, in the order of a run."""
