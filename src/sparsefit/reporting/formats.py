"""Figures as people read them: percentages, durations, GPU-hours, bytes. What is missing reads as a dash."""

from __future__ import annotations

import math
from typing import Any

from sparsefit.reporting.report import number as _number


def metric(metric: str, value: float | None, missing: str = "—") -> str:
    """A metric's value for people; accuracies are shares (0 to 1) and read as percentages."""
    if value is None:
        return missing
    if "accuracy" in metric and 0 <= value <= 1:
        return f"{value:.2%}"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{3 if abs(value) < 1 else 2 if abs(value) < 100 else 1}f}"


def distance(metric: str, distance: float | None, missing: str = "—") -> str:
    """A distance between two values of a metric: nats of perplexities, points of accuracies, else as it is."""
    if distance is None:
        return missing
    if "perplexity" in metric:
        return f"{distance:+.3f} nats"
    return f"{100 * distance:+.2f} points" if "accuracy" in metric else f"{distance:+.4g}"


def percent(share: float | None, digits: int = 2, missing: str = "—") -> str:
    """A share as a percentage."""
    return missing if share is None else f"{share:.{digits}%}"


def hours(hours: float | None, missing: str = "—") -> str:
    """GPU-hours with three significant digits; less than a thirtieth of a second is only called less."""
    if hours is None:
        return missing
    if 0 < hours < 1e-5:
        return "<0.00001"
    return "0" if hours == 0 else f"{hours:,.{max(0, 2 - math.floor(math.log10(abs(hours))))}f}"


def seconds(seconds: float | None, missing: str = "—") -> str:
    """A duration for people: 3.2 s, 4 min 05 s, 2 h 10 min."""
    if seconds is None:
        return missing
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None, missing: str = "—") -> str:
    """Bytes in binary units: 1.50 GiB, 957 MiB."""
    if count is None:
        return missing
    power = min(4, max(0, (int(count).bit_length() - 1) // 10))
    size = count / 1024**power
    return f"{size:.{2 if power and size < 100 else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def count(count: Any, missing: str = "—") -> str:
    """A whole number with thousands separators."""
    value = _number(count)
    return missing if value is None else f"{value:,.0f}"
