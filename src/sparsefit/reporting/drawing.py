"""The style of a report's figures, which are drawn with matplotlib and returned as SVG text to embed in a page.

Text and lines take the page's colours (`--ink`, ...), so that a figure is readable in a light and in a dark theme. All
ids contain a digest of the figure, so that one page can hold several figures.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

from sparsefit.extras import has, missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Draw = TypeVar("_Draw", bound=Callable[..., Any])

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
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), LINE),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK),
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_LOG_FROM = 1.5  # a perplexity that spans more than this factor is drawn on a log scale


def styled(draw: _Draw) -> _Draw:
    """Make a function draw in the project's style, whatever the user's matplotlibrc, without changing global state.

    If matplotlib is not installed, the function is not called and the figure is None.
    """

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        if not has("matplotlib"):
            return None
        from matplotlib import style

        with style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return styled


def why_no_figures() -> str:
    """A page's explanation if figures cannot be drawn; else the empty string."""
    return "" if has("matplotlib") else f"There are no figures: they need {missing('matplotlib')}"


def figure_of(width: float, height: float) -> Figure:
    """An empty figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def metric_axis(axes: Axes, metric: str, values: Sequence[float]) -> str:
    """Scale the y axis for values of a metric; returns "log scale, " if perplexities are far apart, else ""."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = min(values), max(values)
    log = "perplexity" in metric and low > 0 and high > _LOG_FROM * low
    if log:
        axes.set_yscale("log")
        axes.set_ylim(low * (low / high) ** 0.14, high * (high / low) ** 0.14)
    else:
        room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
    wide = log and high > 4 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    share = "accuracy" in metric and 0 <= low <= high <= 1
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}%" if share else f"{y:,.5g}"))
    axes.minorticks_off()
    axes.grid(axis="y")
    return "log scale, " if log else ""


def svg(figure: Figure, description: str) -> str:
    """The figure as one `<svg>` element with the page's colours and unique ids."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    digest = "f" + hashlib.sha256(text.encode()).hexdigest()[:10]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{digest}-", text[text.index("<svg") :])
    for colour, variable in _THEMED.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def standalone(text: str) -> str:
    """A figure from `svg` as a standalone file, with the colours of both themes and a background."""
    theme = (files(__package__) / "templates" / "theme.css").read_text(encoding="utf-8")
    return text.replace(">", f"><style>{theme}</style>", 1)
