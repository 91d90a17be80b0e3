"""The page of a pruning study: what was run, what came of it, what failed and what it cost, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from sparsefit.reporting import formats as _formats
from sparsefit.reporting import report as _report
from sparsefit.reporting import sections
from sparsefit.reporting.figures import time_by_kind
from sparsefit.reporting.markup import MISSING, as_facts, as_table, as_text, card, header, page, tile
from sparsefit.reporting.study_differences import differences
from sparsefit.reporting.study_figures import Panel, draw_panels, granularity_panels, score_panels
from sparsefit.reporting.study_progress import count_points, progress
from sparsefit.reporting.study_results import PRUNED, Results, in_order, per, read_results, seconds_by_kind, unique
from sparsefit.reporting.study_table import Cell, Table, results_table

_STYLE = """
.panels{display:grid;gap:20px 24px;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr))}
.panels svg{max-width:600px}
.panels h3{margin-top:0}
.results{font-variant-numeric:tabular-nums}.results+h3{margin-top:26px}.results+.results{margin-top:14px}
.results table{width:auto;min-width:min(100%,480px)}
.results th:first-child,.results td:first-child{position:sticky;left:0;background:var(--card);font-weight:600}
.results .n,.results small{white-space:nowrap}
.tiles>*{flex-basis:138px}.tile{padding:14px}.tile b{font-size:1.3rem}
.results .g{text-align:center;border-bottom:0;padding-bottom:0;color:var(--ink)}
.results small{display:block;font-weight:400;color:var(--muted);font-size:.78rem;line-height:1.3}
.bad{color:var(--bad)}
.errors code{color:var(--bad)}
"""


def render_study(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Render a study as one HTML page that needs no network and reads on a phone, in light and in dark.

    Args:
        study: The study: `name`, `created`, `command`, `folder`, `metrics` (name to "higher" or "lower"), `models`
            (what is known of each), `finetuning`, `seconds` by kind of work, `versions`, `machine`, `config`;
            `planned`, `status` and `failure` as in `progress`.
        rows: One row for each point and stage: `model`, `stage`, `score`, `granularity`, `update`, `pattern`,
            `sparsity`, `epochs`, `calibration_seed`, `training_seed`, `used_update` (the order that was really used),
            `counted`, the metrics, seconds and `error`.

    Returns:
        The whole page; write it as UTF-8. Whatever study and rows do not hold is left out of it.
    """
    results = read_results(study, rows)
    parts = [
        _header(study, results),
        f'<div class="tiles">{"".join(_tiles(study, results))}</div>',
        *_figures(study, rows),
        card("Results", _tables(results_table(study, rows)) + _counted(results)),
        _differences(study, rows),
        _other_metrics(study, rows, results),
        _failures(results),
        _time(study, results),
        _models(study, results),
        sections.configuration({"configuration": study.get("config")}),
        sections.surroundings(study),
    ]
    return page(str(study.get("name") or "study"), "sparsefit study", parts, _STYLE)


def _header(study: Mapping[str, Any], results: Results) -> str:
    done, failed = count_points(results)
    state = progress(study, results)
    if not results.points:
        badge, kind, notice = "no points", "interrupted", "No point of this study has been measured."
    elif not done:
        badge, kind = "failed" if state.whole else state.told, "failed"
        notice = "No point of this study could be measured; the reasons are below."
    elif not state.whole:
        badge, kind, notice = state.told, "interrupted", ""
    elif results.failures:
        badge, kind, notice = f"{failed or len(results.failures)} failed", "interrupted", ""
    else:
        badge, kind, notice = f"{done} point{'s' if done > 1 else ''}", "finished", ""
    kind = "failed" if state.status == "failed" else kind
    notice = " ".join(sentence for sentence in (notice, state.reason) if sentence)
    facts = (study.get("created"), study.get("folder"))
    return header(str(study.get("name") or "study"), badge, kind, facts, study.get("command"), notice)


def _tiles(study: Mapping[str, Any], results: Results) -> list[str]:
    """What was run: how many of what, and their names."""
    state = progress(study, results)
    points = sorted(results.points, key=lambda point: (point.pattern != "", point.sparsity, point.pattern))
    named = {
        "models": results.models if len(results.models) > 1 else [],
        "scores": unique(point.way.score for point in results.points),
        "granularities": unique(per(p.way.granularity) for p in results.points if p.way.granularity),
        "sparsities": unique(point.amount for point in points),
    }
    notes = state.notes or ["all of them measured"] if state.whole else ["measured", *state.notes]
    tiles = [tile(state.unit, state.count, ", ".join(notes))]
    tiles += [tile(label, str(len(names)), ", ".join(names)) for label, names in named.items() if names]
    spent = seconds_by_kind(study)
    if spent:
        most = max(spent, key=lambda kind: spent[kind])
        note = f"{spent[most] / sum(spent.values()):.0%} {most}"
        tiles.append(tile("time", _formats.seconds(sum(spent.values())), note))
    return tiles


def _figures(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All panels of one model in one card; of several models the scores first, then the granularities."""
    scores, granularities = score_panels(study, rows), granularity_panels(study, rows)
    if len(scores) == 1:
        return [_panels("", [*scores, *granularities])]
    return [_panels("Scores: ", scores), _panels("Granularities: ", granularities)]


def _panels(title: str, panels: Sequence[Panel]) -> str:
    """A card of figures, one for each panel, so that they find their place on any screen."""
    measured = " and ".join(unique(panel.metric.replace("_", " ") for panel in panels))
    drawn = "".join(draw_panels([panel]) or "" for panel in panels)
    heading = f"{title}{escape(measured)} against sparsity"
    return card(heading[:1].upper() + heading[1:], f'<div class="panels">{drawn}</div>' if drawn else "")


def _differences(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    found = differences(study, rows)
    several = len(unique(row.model for row in found.rows)) > 1
    lines = []
    for row in found.rows:
        name = f"{row.model}: {row.compared}" if several else row.compared
        lines.append(
            (escape(name), escape(row.stage), *(escape(row.cells.get(a, "")) or MISSING for a in found.amounts))
        )
    table = as_table(("", "stage", *map(escape, found.amounts)), lines)
    body = f'<div class="results">{table}</div><p class="muted small">{escape(found.note)}</p>'
    return card(found.title, body if lines else "")


def _counted(results: Results) -> str:
    """How far the zeros that were counted are from the sparsity that was asked for."""
    gaps = [abs(point.counted - point.sparsity) for point in results.points if point.counted is not None]
    told = (
        f"The zeros counted in the models are within {100 * max(gaps, default=0):.2g} points of the sparsity asked for."
    )
    return f'<p class="muted small">{told}</p>' if gaps else ""


def _tables(tables: Sequence[Table]) -> str:
    """The tables of each model below its name, and how to read them."""
    shown = ""
    for (model, metric), group in groupby(tables, key=lambda table: (table.model, table.metric)):
        own = list(group)
        dense = f", dense {_formats.metric(metric, own[0].dense)}" if own[0].dense is not None else ""
        shown += f"<h3>{escape(model)}: {escape(metric.replace('_', ' '))}{dense}</h3>{''.join(map(_table, own))}"
    unit = " in points" if tables and all("accuracy" in table.metric for table in tables) else ""
    cells = [cell for table in tables for _, line in table.rows for cell in line]
    spread = " Behind ±: the standard deviation over seeds." if any(cell.runs > 1 for cell in cells) else ""
    best = "the best of a row and what is within its spread" if spread else "the best of a row"
    note = f"Bold: {best}. Small: the difference from the dense model{unit}.{spread}"
    return f'{shown}<p class="muted small">{note}</p>' if shown else ""


def _table(table: Table) -> str:
    stages = [(escape(stage), len(list(group))) for stage, group in groupby(column.stage for column in table.columns)]
    heads = [f"{escape(c.score)}<small>{escape(c.detail).replace(', ', '<br>')}</small>" for c in table.columns]
    marks = table.marks()
    rows = [(escape(amount), *(_cell(table.metric, cell, marks) for cell in cells)) for amount, cells in table.rows]
    groups = [("", 1), *stages] if [stage for stage, _ in stages] != [PRUNED] else []
    first = "sparsity" if any("%" in amount for amount, _ in table.rows) else "pattern"
    notes = "<br>".join(f"{mark} {escape(in_order(used))}, not in the one asked for" for used, mark in marks.items())
    note = f'<p class="muted small">{notes}</p>' if notes else ""
    return f'<div class="results">{as_table((first, *heads), rows, groups=groups)}{note}</div>'


def _cell(metric: str, cell: Cell, marks: Mapping[str, str]) -> str:
    if cell.value is None:
        return '<span class="bad">failed</span>' if cell.failed else MISSING
    value, change = cell.told(metric, marks.get(cell.used, ""))
    return f"{f'<b>{value}</b>' if cell.best else value}<small>{change or '&nbsp;'}</small>"


def _other_metrics(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], results: Results) -> str:
    """Figure and tables of each metric that is not the first of every model, folded up."""
    folded = []
    for metric in results.metrics:
        tables = results_table(study, rows, metric)
        if all(results.metric_of(table.model) == metric for table in tables):
            continue
        drawn = "".join(draw_panels([panel]) or "" for panel in score_panels(study, rows, metric))
        body = f'<div class="panels">{drawn}</div>{_tables(tables)}'
        title = escape(metric.replace("_", " "))
        folded.append(
            f'<section class="card"><details><summary>Also measured: {title}</summary>{body}</details></section>'
        )
    return "".join(folded)


def _failures(results: Results) -> str:
    """Each error with the points that it ended."""
    ended: dict[str, list[str]] = {}
    for point, error in results.failures:
        way = ", ".join(
            part for part in (results.name(point.way), point.way.score and point.amount, point.stage) if part
        )
        ended.setdefault(error, []).append(f"{point.model}: {way}")
    items = "".join(
        f'<li><code>{escape(error)}</code><div class="muted small">{escape("; ".join(points))}</div></li>'
        for error, points in ended.items()
    )
    return card(f"Failed: {len(results.failures)}", f'<ul class="errors">{items}</ul>' if items else "")


def _time(study: Mapping[str, Any], results: Results) -> str:
    """Where the time went, and what a point of each score takes."""
    kinds = {"selection": "choosing weights", "evaluation": "evaluation", "finetuning": "fine-tuning"}
    points = results.points
    kinds = {kind: title for kind, title in kinds.items() if any(kind in point.seconds for point in points)}
    rows = []
    for score in unique(point.way.score for point in points):
        spent = {k: [p.seconds[k] for p in points if p.way.score == score and k in p.seconds] for k in kinds}
        means = [_formats.seconds(sum(s) / len(s)) if s else MISSING for s in spent.values()]
        rows.append((escape(score), *means))
    table = as_table(("score", *kinds.values()), rows) if kinds else ""
    note = '<p class="muted small">Means over the points of a score.</p>' if table else ""
    cards = card("Where the time went", time_by_kind(seconds_by_kind(study)) or "") + card(
        "Time of one point", table + note
    )
    return f'<div class="grid">{cards}</div>' if cards else ""


def _models(study: Mapping[str, Any], results: Results) -> str:
    """What is known of each model: its size, its dense quality, its calibration and training, what stays dense."""
    shown = "".join(_model(model, _report.section(study, "models", model), results) for model in results.models)
    return card("Models", f'<div class="panels">{shown}</div>' if shown else "")


def _model(name: str, model: Mapping[str, Any], results: Results) -> str:
    parameters, prunable = _report.number(model.get("parameters")), _report.number(model.get("prunable"))
    facts: list[tuple[str, Any]] = [("class", model["class"])] if model.get("class") else []
    facts += [("parameters", _formats.count(parameters))] if parameters is not None else []
    of_all = f" ({prunable / parameters:.1%})" if prunable and parameters else ""
    facts += [("prunable weights", f"{_formats.count(prunable or None)}{of_all}")] if model else []
    for metric, value in results.dense.get(name, {}).items():
        facts.append((f"dense {metric.replace('_', ' ')}", _formats.metric(metric, value)))
    for kind in ("calibration", "training"):
        if known := _report.section(model, kind):
            facts.append((kind, _spent(known)))
    notes = "".join(f"<li>{as_text(note)}</li>" for note in _report.items(model, "notes"))
    left = _report.section(model, "left_dense")
    body = as_facts(facts) + (f'<ul class="small">{notes}</ul>' if notes else "")
    if left:
        count = f"{len(left)} weight{'s' if len(left) > 1 else ''}"
        body += f'<details class="small"><summary>{count} left dense</summary>{as_facts(left.items())}</details>'
    return f"<div><h3>{escape(name)}</h3>{body}</div>" if body else ""


def _spent(known: Mapping[str, Any]) -> str:
    """A calibration or a training in words: 4,096 samples of train, 12.1 s."""
    parts = []
    for unit in ("samples", "epochs"):
        if _report.number(known.get(unit)) is not None:
            parts.append(f"{_formats.count(known[unit])} {unit}")
    text = " ".join([*parts, *([f"of {known['source']}"] if known.get("source") else [])])
    seconds = _report.number(known.get("seconds"))
    return ", ".join(part for part in (text, _formats.seconds(seconds) if seconds is not None else "") if part)
