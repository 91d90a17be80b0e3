"""The style of a report's figures, which are drawn with matplotlib and returned as SVG text to be placed inside a page.

Ink and lines take the page's colours (`--ink`, `--muted`, `--line`, `--card`) where the page defines them, so that a
figure reads in a light and in a dark theme. All ids carry a digest of the figure: any number of them live in one page.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sparsefit.reporting.markup import THEME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Arguments = ParamSpec("_Arguments")
_Drawn = TypeVar("_Drawn")

STAGE_COLOURS = {
    "dense": "#8492a6",
    "pruned": "#e8833a",
    "reconstructed": "#c9a227",
    "recovered": "#2a9d8f",
    "merged": "#4f83d6",
    "control": "#9b6bc4",
}
INK, MUTED, LINE, CARD = "#1c2733", "#66727f", "#dfe4e9", "#fefefe"
_THEMED = {INK: "--ink", MUTED: "--muted", LINE: "--line", CARD: "--card"}
SERIES = ("#4f83d6", "#2a9d8f", "#e8833a", "#9b6bc4", "#d65f7a", "#b59a2b", "#5aa9c9", "#8492a6")
WIDTH = 5.0
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsefit",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"


def styled(draw: Callable[_Arguments, _Drawn]) -> Callable[_Arguments, _Drawn]:
    """Draw in the project's style, whatever the user's matplotlibrc says, and leave no global state behind."""

    @functools.wraps(draw)
    def styled(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Drawn:
        from matplotlib import style

        with style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return styled


def time_unit(hours: float) -> tuple[float, str]:
    """What to multiply GPU-hours by, and the unit they then have, so that so many of them are a readable number."""
    if hours >= 1:
        return 1.0, "GPU-hours"
    return (60.0, "GPU-minutes") if hours >= 1 / 60 else (3600.0, "GPU-seconds")


def mark_budget(axes: Axes, last: float, budget: float | None) -> None:
    """Let the time axis reach from 0 to the last moment, and to the budget, with a mark, where that lies near."""
    near = budget is not None and last < 1.25 * budget
    axes.set_xlim(0, 1.02 * max(last, budget if budget is not None and near else 0) or 1)
    if budget is not None and near:
        axes.axvline(budget, color=SERIES[4], lw=1.2, ls="--")
        note(axes, budget, "budget", "right")


def note(axes: Axes, x: float, text: str, side: str) -> None:
    """A small text at the upper edge, on the `side` of its own that touches x."""
    offset = 4 if side == "left" else -4
    where = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top", "ha": side}
    axes.annotate(text, (x, 1.0), (offset, -2), fontsize=9, color=MUTED, **where)


def figure_of(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def grid(figure: Figure, rows: int, columns: int, **ratios: Any) -> list[Axes]:
    """The axes of a grid, row by row."""
    return list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios or None).flat)


def svg(figure: Figure, description: str) -> str:
    """The figure as one `<svg>` element that scales with the page and shares no id with any other."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    digest = "f" + hashlib.sha256(text.encode()).hexdigest()[:10]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{digest}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", _FONT, text)
    for colour, variable in _THEMED.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    label = f'role="img" aria-label="{escape(description)}" stroke-linejoin="round"'
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg {label} \1 xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


def standalone(text: str) -> str:
    """A figure of `svg` as a file of its own: it brings the colours of both themes, a background and its size."""
    width, height = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', text).groups()
    head, body = text.split(">", 1)
    ground = f'<rect width="{width}" height="{height}" rx="8" style="fill:var(--card)"/>'
    return f'{head} width="{width}pt" height="{height}pt"><style>{THEME}</style>{ground}{body}'
