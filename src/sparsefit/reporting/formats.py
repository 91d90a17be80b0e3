"""Formatting numbers for people: percentages, durations, GPU-hours, bytes. Missing values become a dash."""

from __future__ import annotations

import math
from typing import Any

from sparsefit.reporting.report import number

MISSING = "—"
_NAMES = {"seconds": "time", "stop_reason": "stopped because", "gpu_hours": "GPU-hours", "prunable": "prunable weights"}


def metric(name: str, value: float | None) -> str:
    """A metric's value; accuracies are shares (0 to 1) and shown as percentages."""
    if value is None:
        return MISSING
    if "accuracy" in name and 0 <= value <= 1:
        return f"{value:.2%}"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{3 if abs(value) < 1 else 2 if abs(value) < 100 else 1}f}"


def distance(name: str, distance: float | None) -> str:
    """The distance of two values of a metric: in nats for perplexities, in points for accuracies, else a number."""
    if distance is None:
        return MISSING
    if "perplexity" in name:
        return f"{distance:+.3f} nats"
    return f"{100 * distance:+.2f} points" if "accuracy" in name else f"{distance:+.4g}"


def percent(share: Any, digits: int = 2) -> str:
    """A share as a percentage."""
    return MISSING if (value := number(share)) is None else f"{value:.{digits}%}"


def hours(hours: Any) -> str:
    """GPU-hours with three significant digits, or "<0.00001"."""
    if (value := number(hours)) is None:
        return MISSING
    if 0 < value < 1e-5:
        return "<0.00001"
    return "0" if value == 0 else f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def seconds(seconds: Any) -> str:
    """A duration: 3.2 s, 4 min 05 s, 2 h 10 min."""
    if (value := number(seconds)) is None:
        return MISSING
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: Any) -> str:
    """Bytes in binary units: 1.50 GiB, 957 MiB."""
    if (value := number(count)) is None:
        return MISSING
    power = min(4, max(0, (int(value).bit_length() - 1) // 10))
    scaled = value / 1024**power
    return f"{scaled:.{2 if power and scaled < 100 else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def count(count: Any) -> str:
    """A whole number with thousands separators."""
    return MISSING if (value := number(count)) is None else f"{value:,.0f}"


def name(key: str) -> str:
    """A key of a report as words."""
    return _NAMES.get(key, key.removesuffix("_bytes").replace("_", " "))


def value(value: Any, key: str = "") -> str:
    """Any value of a report, in the unit of its key."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or MISSING
    if number(value) is None:
        return str(value)
    formatters = {"seconds": seconds, "gpu_hours": hours, "sparsity": percent, "coverage": percent}
    formatters |= {"overall_sparsity": percent, "memory_bytes": size, "peak_memory_bytes": size}
    if key in formatters:
        return formatters[key](value)
    if "perplexity" in key or "accuracy" in key:
        return metric(key, value)
    return count(value) if isinstance(value, int) else f"{value:.6g}"
