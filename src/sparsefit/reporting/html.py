"""The run's report as one self-contained HTML page: no script, no font, no image from anywhere else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from sparsefit.reporting import figures
from sparsefit.reporting import report as _report

_MISSING = "—"
_STATUS_NOTES = {
    "interrupted": "This run was interrupted. Everything below covers what had run until then.",
    "failed": "This run failed. Everything below covers what had run until then.",
}
_STYLE = """
:root{color-scheme:light dark;--page:#f4f6f8;--card:#fff;--ink:#1c2733;--muted:#66727f;--line:#dfe4e9;--accent:#2a9d8f;
--warn:#8a5a00;--warnbg:#fff3d6;--bad:#a3262e;--badbg:#fde4e4;--good:#17695f;--goodbg:#dcf3ee}
@media(prefers-color-scheme:dark){:root{--page:#12171d;--card:#1b222b;--ink:#e6ebf0;--muted:#9aa7b4;--line:#323c47;
--accent:#46bfae;--warn:#ffd27a;--warnbg:#3d3010;--bad:#ffa8a8;--badbg:#44191c;--good:#8fe0d2;--goodbg:#123a34}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 16px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:0 12px 0 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 12px}
h3{font-size:.95rem;margin:18px 0 6px}
.top{display:flex;flex-wrap:wrap;align-items:center;gap:6px}
.badge{border-radius:99px;padding:2px 12px;font-size:.85rem;font-weight:600;background:var(--line)}
.finished{background:var(--goodbg);color:var(--good)}.interrupted{background:var(--warnbg);color:var(--warn)}
.failed{background:var(--badbg);color:var(--bad)}
.notice{border-radius:10px;padding:10px 16px;margin:14px 0 0;font-weight:600}
.muted{color:var(--muted)}.small{font-size:.85rem}
.grid{display:grid;gap:14px;margin-top:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.tiles{display:flex;flex-wrap:wrap;gap:14px;margin-top:22px}
.tiles>*{flex:1 1 150px;overflow-wrap:anywhere}.tiles>.wide{flex:2 1 400px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px;min-width:0}
section.card{margin-top:14px}
.grid.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr))}
.grid>section.card{margin-top:0}
.grid>section:last-child:nth-child(odd){grid-column:1/-1}
.card svg{display:block;width:100%;height:auto;max-width:540px;margin:0 auto}
.tile b{display:block;white-space:nowrap;font-size:1.4rem;line-height:1.25;font-variant-numeric:tabular-nums}
.steps{display:flex;flex-wrap:wrap;align-items:end;gap:4px 10px}
.steps .muted{padding-bottom:.3rem}
.meter{height:6px;border-radius:3px;background:var(--line);margin:8px 0 2px;overflow:hidden}
.meter i{display:block;height:100%;background:var(--accent)}
.meter .over{background:var(--bad)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--muted)}
tbody tr:last-child>*{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums}td.n,td code{white-space:nowrap}
.total td{font-weight:600;border-top:2px solid var(--line)}
.facts th{width:32%}.facts th,.facts td{overflow-wrap:anywhere}
code,pre{font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{margin:0;white-space:pre-wrap;background:var(--page);border-radius:8px;padding:12px 14px}
summary{cursor:pointer;font-weight:600}
details[open]>summary{margin-bottom:10px}
ul{margin:6px 0;padding-left:20px}
@media(max-width:520px){h1{font-size:1.4rem}.card{padding:14px 12px}
table{font-size:.8rem}th,td{padding:5px 4px}td code{font-size:.75rem}}
"""


def render_html(report: Mapping[str, Any]) -> str:
    """Render a report as one HTML page that needs no network and reads on a phone, in light and in dark.

    Args:
        report: The run's report; whatever it does not hold is left out of the page.

    Returns:
        The whole page; write it as UTF-8.
    """
    tables = [_types(report), _stages(report)]
    parts = [
        _header(report),
        f'<div class="tiles">{"".join(_tiles(report))}</div>',
        _figures(report),
        f'<div class="grid wide">{"".join(tables)}</div>' if any(tables) else "",
        _layers(report),
        _pruning(report),
        _training(report),
        _configuration(report),
        _surroundings(report),
    ]
    title = escape(str(report.get("name") or "run"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} · sparsefit report</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"
    )


def _text(value: Any) -> str:
    """Any value as escaped text; containers as JSON."""
    if value is None or value == "":
        return _MISSING
    if isinstance(value, (Mapping, list, tuple)):
        return escape(json.dumps(value, default=str, ensure_ascii=False))
    return escape(str(value))


def _card(title: str, body: str) -> str:
    return f'<section class="card"><h2>{title}</h2>{body}</section>' if body else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None) -> str:
    """A table of escaped cells; the first column holds text, the others numbers."""

    def row(cells: Sequence[str], tag: str = "td", kind: str = "") -> str:
        inner = "".join(f"<{tag}{' class=n' if index else ''}>{cell}</{tag}>" for index, cell in enumerate(cells))
        return f"<tr{kind}>{inner}</tr>"

    body = "".join(row(cells) for cells in rows) + (row(total, kind=" class=total") if total else "")
    return f'<div class="scroll"><table><thead>{row(columns, "th")}</thead><tbody>{body}</tbody></table></div>'


def _facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values; empty where there are none."""
    rows = "".join(f"<tr><th>{escape(str(name))}</th><td>{_text(value)}</td></tr>" for name, value in pairs)
    return f'<table class="facts">{rows}</table>' if rows else ""


def _header(report: Mapping[str, Any]) -> str:
    status = str(report.get("status") or "unknown")
    kind = status if status in ("finished", "interrupted", "failed") else "unknown"
    notice = f'<p class="notice {kind}">{_STATUS_NOTES[kind]}</p>' if kind in _STATUS_NOTES else ""
    facts = [str(report[key]) for key in ("created", "folder") if report.get(key)]
    command = f"<pre>{escape(str(report['command']))}</pre>" if report.get("command") else ""
    return (
        f'<header><div class="top"><h1>{_text(report.get("name") or "run")}</h1>'
        f'<span class="badge {kind}">{escape(status)}</span></div>'
        f'<p class="muted small" style="overflow-wrap:anywhere">{" · ".join(escape(fact) for fact in facts)}</p>'
        f"{command}{notice}</header>"
    )


def _tile(label: str, value: str, note: str = "", more: str = "") -> str:
    note = f'<div class="muted small">{escape(note)}</div>' if note else ""
    return (
        f'<div class="card tile"><div class="muted small">{escape(label)}</div><b>{escape(value)}</b>{more}{note}</div>'
    )


def _tiles(report: Mapping[str, Any]) -> list[str]:
    tiles = []
    for metric in _report.metrics(report):
        tiles += _metric_tiles(report, metric)
    sparsity = _report.section(report, "sparsity")
    if _report.number(sparsity.get("total")) is not None:
        asked = _report.number(sparsity.get("asked"))
        known = [f"asked {_report.format_percent(asked)}"] if asked is not None else []
        known += [f"pattern {sparsity['pattern']}"] if sparsity.get("pattern") else []
        known += [f"counted on {sparsity['counted_on']}"] if sparsity.get("counted_on") else []
        tiles.append(_tile("sparsity", _report.format_percent(_report.number(sparsity["total"])), ", ".join(known)))
    return tiles + _cost_tiles(report)


def _metric_tiles(report: Mapping[str, Any], metric: str) -> list[str]:
    values, share = _report.metric_values(report, metric), _report.won_back(report, metric)
    if not values:
        return []
    steps = '<span class="muted">→</span>'.join(
        f'<div><div class="muted small">{stage}</div>'
        f'<b style="border-bottom:3px solid {figures.STAGE_COLOURS[stage]}">'
        f"{_report.format_metric(metric, value)}</b></div>"
        for stage, value in values.items()
    )
    text = _report.section(report, "evaluation").get("text")
    note = f'<div class="muted small" style="margin-top:8px">{escape(str(text))}</div>' if text else ""
    label = f'<div class="muted small">{escape(metric)}</div>'
    tiles = [f'<div class="card tile wide">{label}<div class="steps">{steps}</div>{note}</div>']
    if share is not None:
        how = "of the log-perplexity lost to pruning" if "perplexity" in metric else f"of the {metric} lost to pruning"
        tiles.append(_tile("won back by recovery", _report.format_percent(share, 1), how))
    return tiles


def _cost_tiles(report: Mapping[str, Any]) -> list[str]:
    tiles = []
    spent, memory = _report.section(report, "gpu_hours"), _report.section(report, "memory")
    total, budget = _report.number(spent.get("total")), _report.number(spent.get("budget"))
    if total is not None:
        devices = _report.number(spent.get("devices"))
        notes = [f"{devices:.0f} device{'s' if devices != 1 else ''}"] if devices else []
        notes.insert(0, f"of {_report.format_hours(budget)} ({total / budget:.1%})" if budget else "no budget set")
        meter = ""
        if budget:
            over = ' class="over"' if total > budget else ""
            meter = f'<div class="meter"><i{over} style="width:{min(100, 100 * total / budget):.1f}%"></i></div>'
        tiles.append(_tile("GPU-hours", _report.format_hours(total), ", ".join(notes), meter))
    peak = _report.number(memory.get("peak_bytes"))
    if peak is not None:
        tiles.append(_tile("peak memory", _report.format_bytes(peak), str(memory.get("kind") or "")))
    return tiles


def _figures(report: Mapping[str, Any]) -> str:
    drawn = [draw(report) for draw in (figures.quality, figures.loss, figures.sparsity, figures.gpu_hours)]
    cards = "".join(f'<section class="card">{svg}</section>' for svg in drawn if svg)
    return f'<div class="grid">{cards}</div>' if cards else ""


def _types(report: Mapping[str, Any]) -> str:
    rows = [
        (
            f"<code>{escape(name)}</code>",
            *(_report.format_count(entry.get(key)) for key in ("layers", "weights", "zeros")),
            _report.format_percent(_report.layer_sparsity(entry)),
        )
        for name, entry in _report.sparsity_by_type(report).items()
    ]
    sparsity = _report.section(report, "sparsity")
    layers = len(_report.items(report, "sparsity", "layers")) or None
    counts = (_report.format_count(count) for count in (layers, sparsity.get("weights"), sparsity.get("zeros")))
    total = ("all", *counts, _report.format_percent(_report.number(sparsity.get("total"))))
    columns = ("layers", "count", "weights", "zeros", "sparsity")
    return _card("Sparsity by layer type", _table(columns, rows, total) if rows else "")


def _layers(report: Mapping[str, Any]) -> str:
    layers = [layer for layer in _report.items(report, "sparsity", "layers") if isinstance(layer, Mapping)]
    if not layers:
        return ""
    rows = [
        (
            f"<code>{_text(layer.get('name'))}</code>",
            escape(" x ".join(map(str, _report.items(layer, "shape")))) or _MISSING,
            _report.format_count(layer.get("weights")),
            _report.format_count(layer.get("zeros")),
            _report.format_percent(_report.layer_sparsity(layer)),
        )
        for layer in layers
    ]
    table = _table(("layer", "shape (out x in)", "weights", "zeros", "sparsity"), rows)
    return f'<section class="card"><details><summary>All {len(layers)} layers</summary>{table}</details></section>'


def _stages(report: Mapping[str, Any]) -> str:
    spent = _report.section(report, "gpu_hours")
    budget, total = _report.number(spent.get("budget")), _report.number(spent.get("total"))
    seconds = _report.number(_report.section(report, "seconds").get("total"))

    def cells(name: str, time: float | None, hours: float | None) -> tuple[str, ...]:
        share = [_report.format_percent(None if hours is None else hours / budget, 1)] if budget else []
        return (escape(name), _report.format_seconds(time), _report.format_hours(hours), *share)

    rows = [cells(*stage) for stage in _report.stages(report)]
    if not rows and total is None and seconds is None:
        return ""
    columns = ("stage", "time", "GPU-hours", *(["of budget"] if budget else []))
    note = f'<p class="muted small">Budget: {_report.format_hours(budget)} GPU-hours.</p>' if budget else ""
    return _card("Time and GPU-hours", _table(columns, rows, cells("total", seconds, total)) + note)


def _pruning(report: Mapping[str, Any]) -> str:
    pruning = _report.section(report, "pruning")
    config = _report.section(pruning, "config")
    facts: list[tuple[str, Any]] = [(key, "none" if value is None else value) for key, value in config.items()]
    if pruning.get("update") not in (None, config.get("update")):
        facts.append(("order used", pruning["update"]))
    facts += [
        (f"calibration {key}", _report.format_count(pruning[key])) for key in ("samples", "tokens") if pruning.get(key)
    ]
    if _report.number(pruning.get("seconds")) is not None:
        facts.append(("time", _report.format_seconds(_report.number(pruning["seconds"]))))
    errors = [e for e in map(_report.number, _report.section(pruning, "layer_errors").values()) if e is not None]
    if errors:
        facts.append(("error of a layer's outputs, mean", f"{sum(errors) / len(errors):.2%} of their square"))
    if pruning.get("digest"):
        facts.append(("digest of the masks", pruning["digest"]))
    body = _facts(facts)
    notes = _report.items(pruning, "notes")
    if notes:
        body += f"<h3>Notes</h3><ul>{''.join(f'<li>{_text(note)}</li>' for note in notes)}</ul>"
    left = _report.section(pruning, "left_dense")
    if left:
        body += f"<h3>Left dense</h3>{_facts(left.items())}"
    return _card("Pruning", body)


def _training(report: Mapping[str, Any]) -> str:
    training = _report.section(report, "training")
    history = [entry for entry in _report.items(training, "history") if isinstance(entry, Mapping)]
    losses = [loss for entry in history if (loss := _report.number(entry.get("loss"))) is not None]
    facts: list[tuple[str, Any]] = []
    if training.get("steps") is not None:
        facts.append(("steps", _report.format_count(training["steps"])))
    if training.get("stop_reason"):
        facts.append(("stopped because", training["stop_reason"]))
    if training.get("trainable_parameters") is not None:
        facts.append(("trainable parameters", _report.format_count(training["trainable_parameters"])))
    if losses:
        facts.append(("loss, first and last logged", f"{losses[0]:.4g}, {losses[-1]:.4g}"))
    return _card("Recovery training", _facts(facts))


def _configuration(report: Mapping[str, Any]) -> str:
    configuration = report.get("configuration")
    if not configuration:
        return ""
    text = configuration if isinstance(configuration, str) else json.dumps(configuration, indent=2, default=str)
    return (
        f'<section class="card"><details><summary>Configuration</summary><pre>{escape(text)}</pre></details></section>'
    )


def _surroundings(report: Mapping[str, Any]) -> str:
    facts = []
    for key, value in _report.section(report, "machine").items():
        size = _report.number(value) if key.endswith("_bytes") else None
        shown = _report.format_bytes(size) if size is not None else value
        if isinstance(value, (list, tuple)):
            shown = ", ".join(map(str, value))
        facts.append((key.removesuffix("_bytes").replace("_", " "), shown))
    cards = _card("Machine", _facts(facts)) + _card("Versions", _facts(_report.section(report, "versions").items()))
    return f'<div class="grid">{cards}</div>' if cards else ""
