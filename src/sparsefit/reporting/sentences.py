"""A summary of a run in sentences, for the terminal and the model card. Missing parts of a report are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsefit.reporting import formats
from sparsefit.reporting import report as reading


def pruning(report: Mapping[str, Any]) -> Iterator[str]:
    """How the model was pruned."""
    about, config = reading.section(report, "pruning"), reading.section(report, "pruning", "config")
    amount = config.get("pattern") or formats.percent(config.get("sparsity"))
    if amount == formats.MISSING:
        return
    known = {"score": config.get("score"), "granularity": config.get("granularity")}
    known |= {"order": about.get("update") or config.get("update"), "refined by swaps": config.get("swaps") or None}
    settings = [f"{key} {value}" for key, value in known.items() if value is not None]
    yield f"pruning: {', '.join([str(amount), *settings])}"
    counts = {name: about[name] for name in ("samples", "tokens") if reading.number(about.get(name))}
    if counts:
        amounts = [f"{formats.count(count)} {name}" for name, count in counts.items()]
        yield f"calibration: {', '.join([*amounts, *filter(None, [about.get('source')])])}"


def recovery(report: Mapping[str, Any]) -> Iterator[str]:
    """What followed the pruning: reconstruction, training, merging, the control."""
    training, merged = reading.section(report, "training"), reading.section(report, "merge")
    if errors := reading.block_errors(report):
        before, after = (sum(side) / len(errors) for side in zip(*errors, strict=True))
        yield f"reconstruction: {len(errors)} blocks, mean error of their outputs {before:.3%} -> {after:.3%}"
    if training.get("stop_reason"):
        steps = formats.count(training.get("steps"))
        yield f"training: {steps} steps, stopped because: {training['stop_reason']}"
    if merged.get("lossless"):
        sparsity = formats.percent(merged.get("sparsity"))
        yield f"merged model: {merged.get('form')}, without loss, sparsity {sparsity}, in {merged.get('folder')}"
    elif merged:
        yield f"not merged: {merged.get('form')}, kept apart: {merged.get('reason')}"
    if reading.section(report, "control"):
        yield control(report)


def control(report: Mapping[str, Any]) -> str:
    """The cost of a run's control, and whether recovery can be compared with it."""
    about = reading.section(report, "control")
    steps, hours = formats.count(about.get("steps")), formats.hours(about.get("gpu_hours"))
    text = f"control: {about.get('status')}, {steps} steps, {hours} GPU-hours, not counted in those of the run"
    text += ", without the teacher" if about.get("without_teacher") else ""
    if harmed := reading.control_harmed(report):
        text += f"; this recipe makes the dense model worse in {', '.join(harmed)}: "
        text += "compare the recovered model with the dense model instead"
    return text
