"""The text of a plan: the first line of every fit, the line on its pace, and the summary of `sparsefit plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparsefit.planning.plan_data import Plan, Work
from sparsefit.reporting.formats import percent, seconds, size


def plan_line(
    counts: Mapping[str, float], held: float, gpu_hours: float | None, devices: int, steps: int | None
) -> str:
    """The first line of a fit and of its plan: what is known without running anything.

    >>> plan_line({"all": 10, "pruned": 8, "train": 2}, 2048, 0.5, 1, None)
    'Plan: 10 weights, 8 of them (80%) to prune and 2 to train; at least 2.00 KiB of tensors; 0.5 GPU-hours'

    Args:
        counts: Number of weights: "all", "pruned", and "train" for those that train.
        held: Bytes of weights, gradients, moments and masks, a lower bound of the memory.
        gpu_hours: The budget; None or infinity if there is none.
        devices: Number of devices.
        steps: Optimizer steps after which the run ends; None if there is no such limit.
    """
    limits = [] if gpu_hours in (None, math.inf) else [f"{gpu_hours:g} GPU-hours"]
    limits += [] if steps is None else [f"at most {steps:,} steps"]
    return (
        f"Plan: {weights(counts)}; at least {size(held)} of tensors"
        + (f" on each of {devices} devices" if devices > 1 else "")
        + (f"; {', '.join(limits)}" if limits else "")
    )


def weights(counts: Mapping[str, float]) -> str:
    """The numbers of weights in total, to prune and to train, as text."""
    return (
        f"{counts['all']:,.0f} weights, {counts['pruned']:,.0f} of them "
        f"({percent(counts['pruned'] / max(counts['all'], 1), 0)}) to prune and {counts['train']:,.0f} to train"
    )


def pace_line(step: float, left: float, gpu_hours: float, limit: float = math.inf) -> str:
    """How many steps the rest of a budget pays for, once the time per step is known.

    >>> pace_line(0.5, 60, 0.02)
    'Plan: a step takes 0.5 s, so that what is left of 0.02 GPU-hours buys about 120 more steps (1 min 00 s)'
    >>> pace_line(0.5, 60, 0.02, limit=10)
    'Plan: a step takes 0.5 s, so that the 10 steps to come take about 5.0 s; 0.02 GPU-hours would buy about 120'

    Args:
        step: Wall seconds per optimizer step.
        left: Wall seconds that training may still take.
        gpu_hours: The budget.
        limit: Remaining optimizer steps of the fit, whatever the budget.
    """
    bought = max(left, 0) / step
    if limit < bought:
        then = f"the {limit:,.0f} steps to come take about {seconds(limit * step)}"
        then += f"; {gpu_hours:g} GPU-hours would buy about {bought:,.0f}"
    else:
        left = max(left, 0)
        then = f"what is left of {gpu_hours:g} GPU-hours buys about {bought:,.0f} more steps ({seconds(left)})"
    return f"Plan: a step takes {seconds(step)}, so that {then}"


def plan_summary(plan: Plan, work: Work, unfit: Sequence[str]) -> list[str]:
    """The lines of a plan that follow its table of stages."""
    whose = " of each device" if work.devices > 1 else ""
    memory = ", ".join(f"{stage} {size(peak)}" for stage, peak in plan.peaks.items())
    said = [
        f"memory{whose}: {size(max(plan.peaks.values()))} ({memory})"
        + (f"; on the host: {size(plan.host)}" if plan.host is not None else "")
        + (f"; files: {size(plan.disk)}" if plan.disk else ""),
    ]
    if plan.step:
        ends = "without a limit" if plan.ends_by is None else f"limited by {plan.ends_by}"
        ends = f"as many as {work.gpu_hours:g} GPU-hours buy" if plan.ends_by == "budget" else ends
        said.append(f"training: {plan.steps:,} steps of {seconds(plan.step)}, {ends}")
    if work.sample_tokens > 1:
        of = plan.tokens
        said.append(f"tokens: {of['calibration']:,.0f} to calibrate on, {of['training']:,.0f} to train on")
        said.append(f"arithmetic: {plan.operations:.2g} floating-point operations in calibration and training")
    if work.devices > 1:
        how = "each with its part of the weights and one block as a whole" if work.splits else "each with all weights"
        said.append(f"{work.devices} devices, {how}: computed from one device, without communication time")
    said += [f"DOES NOT FIT: {sentence}" for sentence in unfit]
    if plan.ends_by == "budget" and plan.steps == 0:
        said.append("NOTHING IS TRAINED: the budget is spent before the first step: raise budget.gpu_hours")
    return said
