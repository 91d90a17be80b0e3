"""The pages of a run and of a study: one self-contained HTML file each, rendered from the folder `templates`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparsefit.reporting import formats, run_figures, run_tables, study_tables
from sparsefit.reporting import report as reading
from sparsefit.reporting.drawing import why_no_figures
from sparsefit.reporting.study_figures import Panel, draw_panels, granularity_panels, score_panels
from sparsefit.reporting.study_results import Results, count_points, per, progress, read_results, seconds_by_kind
from sparsefit.reporting.tables import unique

_STOPPED = {"interrupted": "This run was interrupted.", "failed": "This run failed."}


def render_html(report: Mapping[str, Any]) -> str:
    """A run's report as HTML, to be written as UTF-8; whatever the report lacks is left out."""
    status = str(report.get("status") or "unknown")
    figures = (draw(report) for draw in (run_figures.timeline, run_figures.loss, run_figures.sparsity))
    return _filled(
        "report.html",
        name=report.get("name") or "run",
        badge=status,
        kind=status if status == "finished" or status in _STOPPED else "unknown",
        notice=f"{_STOPPED[status]} This page shows what had been measured by then." if status in _STOPPED else "",
        about=report,
        tiles=_run_tiles(report),
        figures=list(filter(None, figures)),
        tables=run_tables,
    )


def _run_tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The key figures of a run: (label, figure, explanation) each."""
    tiles = []
    for metric in reading.metrics(report):
        distance = formats.distance(metric, reading.distance_from_control(report, metric))
        tiles.append(("won back by recovery", formats.percent(reading.won_back(report, metric), 1), metric))
        tiles.append(("distance from control", distance, metric))
    sparsity, spent, memory = (reading.section(report, part) for part in ("sparsity", "gpu_hours", "memory"))
    requested = f"requested: {formats.percent(sparsity['asked'])}" if sparsity.get("asked") is not None else ""
    total, budget = reading.number(spent.get("total")), reading.number(spent.get("budget"))
    share = f"of {formats.hours(budget)} ({total / budget:.1%})" if budget and total is not None else "no budget set"
    share += f", devices: {formats.count(spent['devices'])}" if spent.get("devices") else ""
    tiles.append(("sparsity", formats.percent(sparsity.get("total")), requested))
    tiles.append(("GPU-hours", formats.hours(total), share))
    tiles.append(("peak memory", formats.size(memory.get("peak_bytes")), str(memory.get("kind") or "")))
    return [tile for tile in tiles if tile[1] != formats.MISSING]


def render_study(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """A study (the content of `study.json`) and the rows of its `results.csv` as HTML, to be written as UTF-8."""
    results = read_results(study, rows)
    shown = {*map(results.metric_of, results.models)}
    return _filled(
        "study.html",
        name=study.get("name") or "study",
        about=study,
        **_head(study, results),
        tiles=_study_tiles(study, results),
        results=results,
        figures=_drawn([*score_panels(results), *granularity_panels(results)]),
        tables=study_tables.results_tables(results),
        differences=study_tables.differences(results),
        others={
            metric: (_drawn(score_panels(results, metric)), tables)
            for metric in results.metrics
            if metric not in shown and (tables := study_tables.results_tables(results, metric))
        },
        times={kind: formats.seconds(spent) for kind, spent in seconds_by_kind(study).items()},
        point_times=study_tables.point_times(results),
    )


def _drawn(panels: Sequence[Panel]) -> list[str]:
    """A figure for each panel; none if figures cannot be drawn."""
    return list(filter(None, (draw_panels([panel]) for panel in panels)))


def _head(study: Mapping[str, Any], results: Results) -> dict[str, str]:
    """The badge of a study, its kind, and a sentence on what ended the study."""
    state, done = progress(study, results), count_points(results)[0]
    kind = "finished" if state.whole and not results.failures else "interrupted"
    kind = "failed" if study.get("status") == "failed" or not done else kind
    notice = ["" if done else "No point of this study has been measured.", state.reason]
    return {"badge": state.text, "kind": kind, "notice": " ".join(filter(None, notice))}


def _study_tiles(study: Mapping[str, Any], results: Results) -> list[tuple[str, str, str]]:
    """The extent of a study: (label, count, names) of models, scores, granularities and sparsities; and the time."""
    points = sorted(results.points, key=lambda point: (point.pattern != "", point.sparsity, point.pattern))
    named = {
        "models": results.models,
        "scores": unique(point.way.score for point in results.points),
        "granularities": unique(per(p.way.granularity) for p in results.points if p.way.granularity),
        "sparsities": unique(point.amount for point in points),
    }
    tiles = [(label, str(len(names)), ", ".join(names)) for label, names in named.items() if names]
    spent = sum(seconds_by_kind(study).values())
    return tiles + ([("time", formats.seconds(spent), "")] if spent else [])


def _filled(template: str, **values: Any) -> str:
    """Render a template; values are escaped unless the template marks them as safe (the figures)."""
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("sparsefit.reporting"), autoescape=True, undefined=StrictUndefined)
    environment.globals |= {"formats": formats, "reading": reading, "why_no_figures": why_no_figures}
    return environment
