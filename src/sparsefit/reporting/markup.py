"""The pieces of a report's page: its style sheet, cards, tables and tiles, in which all text is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MISSING = "—"
THEME = """
:root{color-scheme:light dark;--page:#f4f6f8;--card:#fff;--ink:#1c2733;--muted:#66727f;--line:#dfe4e9;--accent:#2a9d8f;
--warn:#8a5a00;--warnbg:#fff3d6;--bad:#a3262e;--badbg:#fde4e4;--good:#17695f;--goodbg:#dcf3ee}
@media(prefers-color-scheme:dark){:root{--page:#12171d;--card:#1b222b;--ink:#e6ebf0;--muted:#9aa7b4;--line:#323c47;
--accent:#46bfae;--warn:#ffd27a;--warnbg:#3d3010;--bad:#ffa8a8;--badbg:#44191c;--good:#8fe0d2;--goodbg:#123a34}}
"""
_LAYOUT = """*{box-sizing:border-box}
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
STYLE = THEME + _LAYOUT


def page(title: str, kind: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page that reads on a phone, in light and in dark, and loads nothing; `style` is added to its own."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · {escape(kind)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"
    )


def header(name: str, badge: str, kind: str, facts: Iterable[Any], command: Any = None, notice: str = "") -> str:
    """The head of a page: name, a badge coloured by its kind, where and when, the command and a notice."""
    notice = f'<p class="notice {kind}">{escape(notice)}</p>' if notice else ""
    shown = " · ".join(escape(str(fact)) for fact in facts if fact)
    return (
        f'<header><div class="top"><h1>{escape(name)}</h1><span class="badge {kind}">{escape(badge)}</span></div>'
        f'<p class="muted small" style="overflow-wrap:anywhere">{shown}</p>'
        f"{f'<pre>{escape(str(command))}</pre>' if command else ''}{notice}</header>"
    )


def as_text(value: Any) -> str:
    """Any value as escaped text; containers as JSON."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, (Mapping, list, tuple)):
        return escape(json.dumps(value, default=str, ensure_ascii=False))
    return escape(str(value))


def card(title: str, body: str) -> str:
    """A card with a heading; nothing where there is nothing to put into it."""
    return f'<section class="card"><h2>{title}</h2>{body}</section>' if body else ""


def as_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    total: Sequence[str] | None = None,
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """A table of escaped cells; the first column holds text, the others numbers.

    Args:
        columns: The head of each column.
        rows: The cells of each row.
        total: A last row that stands out.
        groups: A head above the heads: titles and how many columns each of them spans.
    """

    def row(cells: Sequence[str], tag: str = "td", kind: str = "") -> str:
        inner = "".join(f"<{tag}{' class=n' if index else ''}>{cell}</{tag}>" for index, cell in enumerate(cells))
        return f"<tr{kind}>{inner}</tr>"

    body = "".join(row(cells) for cells in rows) + (row(total, kind=" class=total") if total else "")
    above = "".join(f"<th colspan={span} class=g>{title}</th>" for title, span in groups)
    head = (f"<tr>{above}</tr>" if above else "") + row(columns, "th")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def as_facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values; empty where there are none."""
    rows = "".join(f"<tr><th>{escape(str(name))}</th><td>{as_text(value)}</td></tr>" for name, value in pairs)
    return f'<table class="facts">{rows}</table>' if rows else ""


def tile(label: str, value: str, note: str = "", more: str = "") -> str:
    """A figure in large print; `more` is markup and is not escaped."""
    note = f'<div class="muted small">{escape(note)}</div>' if note else ""
    return (
        f'<div class="card tile"><div class="muted small">{escape(label)}</div><b>{escape(value)}</b>{more}{note}</div>'
    )
