"""The run's report as one self-contained HTML page: no script, no font, no image from anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from sparsefit.reporting import figures, sections
from sparsefit.reporting import formats as _formats
from sparsefit.reporting import report as _report
from sparsefit.reporting.drawing import STAGE_COLOURS
from sparsefit.reporting.markup import header, page, tile
from sparsefit.reporting.sparsity_figure import sparsity as _sparsity_figure
from sparsefit.reporting.task_table import tasks as _tasks
from sparsefit.reporting.timeline_figure import timeline as _timeline_figure

_FIGURES = (figures.quality, _timeline_figure, figures.loss, _sparsity_figure, figures.gpu_hours)
_STATUS_NOTES = {
    "interrupted": "This run was interrupted. Everything below covers what had run until then.",
    "failed": "This run failed. Everything below covers what had run until then.",
}


def render_html(report: Mapping[str, Any]) -> str:
    """Render a report as one HTML page that needs no network and reads on a phone, in light and in dark.

    Args:
        report: The run's report; whatever it does not hold is left out of the page.

    Returns:
        The whole page; write it as UTF-8.
    """
    tables = [sections.types(report), sections.stages(report)]
    parts = [
        _header(report),
        f'<div class="tiles">{"".join(_tiles(report))}</div>',
        _figures(report),
        sections.timeline(report),
        _tasks(report),
        f'<div class="grid wide">{"".join(tables)}</div>' if any(tables) else "",
        *(section(report) for section in sections.DETAILS),
    ]
    return page(str(report.get("name") or "run"), "sparsefit report", parts)


def _header(report: Mapping[str, Any]) -> str:
    status = str(report.get("status") or "unknown")
    kind = status if status in ("finished", "interrupted", "failed") else "unknown"
    facts = (report.get("created"), report.get("folder"))
    name, notice = str(report.get("name") or "run"), _STATUS_NOTES.get(kind, "")
    return header(name, status, kind, facts, report.get("command"), notice)


def _tiles(report: Mapping[str, Any]) -> list[str]:
    tiles = []
    for metric in _report.metrics(report):
        tiles += _metric_tiles(report, metric)
    sparsity = _report.section(report, "sparsity")
    if _report.number(sparsity.get("total")) is not None:
        asked = _report.number(sparsity.get("asked"))
        known = [f"asked {_formats.percent(asked)}"] if asked is not None else []
        known += [f"pattern {sparsity['pattern']}"] if sparsity.get("pattern") else []
        overall = _report.number(sparsity.get("overall_sparsity"))
        known += [f"{_formats.percent(overall)} over all matrices of the model"] if overall is not None else []
        known += [f"counted on {sparsity['counted_on']}"] if sparsity.get("counted_on") else []
        tiles.append(tile("sparsity", _formats.percent(_report.number(sparsity["total"])), ", ".join(known)))
    return tiles + _cost_tiles(report)


def _metric_tiles(report: Mapping[str, Any], metric: str) -> list[str]:
    values, share = _report.metric_values(report, metric), _report.won_back(report, metric)
    if not values:
        return []
    shown = {
        stage: f'<div><div class="muted small">{stage}</div>'
        f'<b style="border-bottom:3px solid {STAGE_COLOURS[stage]}">{_formats.metric(metric, value)}</b></div>'
        for stage, value in values.items()
    }
    control = shown.pop(_report.CONTROL, "")
    steps = '<span class="muted">→</span>'.join(shown.values()) + control
    text = _report.section(report, "evaluation").get("text")
    note = f'<div class="muted small" style="margin-top:8px">{escape(str(text))}</div>' if text else ""
    label = f'<div class="muted small">{escape(metric)}</div>'
    tiles = [f'<div class="card tile wide">{label}<div class="steps">{steps}</div>{note}</div>']
    if share is not None:
        how = "of the log-perplexity lost to pruning" if "perplexity" in metric else f"of the {metric} lost to pruning"
        tiles.append(tile("won back by recovery", _formats.percent(share, 1), how))
    distance = _report.distance_from_control(report, metric)
    if distance is not None:
        how = "ln recovered - ln control" if "perplexity" in metric else "recovered - control"
        note = f"{how}; control: the dense model, trained by the same recipe"
        tiles.append(tile("recovered above control", _formats.distance(metric, distance), note))
    return tiles


def _cost_tiles(report: Mapping[str, Any]) -> list[str]:
    tiles = []
    spent, memory = _report.section(report, "gpu_hours"), _report.section(report, "memory")
    total, budget = _report.number(spent.get("total")), _report.number(spent.get("budget"))
    if total is not None:
        devices = _report.number(spent.get("devices"))
        notes = [f"{devices:.0f} device{'s' if devices != 1 else ''}"] if devices else []
        notes.insert(0, f"of {_formats.hours(budget)} ({total / budget:.1%})" if budget else "no budget set")
        meter = ""
        if budget:
            over = ' class="over"' if total > budget else ""
            meter = f'<div class="meter"><i{over} style="width:{min(100, 100 * total / budget):.1f}%"></i></div>'
        tiles.append(tile("GPU-hours", _formats.hours(total), ", ".join(notes), meter))
    peak = _report.number(memory.get("peak_bytes"))
    if peak is not None:
        tiles.append(tile("peak memory", _formats.size(peak), str(memory.get("kind") or "")))
    return tiles


def _figures(report: Mapping[str, Any]) -> str:
    drawn = [draw(report) for draw in _FIGURES]
    cards = "".join(f'<section class="card">{svg}</section>' for svg in drawn if svg)
    return f'<div class="grid">{cards}</div>' if cards else ""
