"""The model card of a run: a README.md as the Hugging Face hub reads it, written from the run's report alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from sparsefit.reporting import report as reading
from sparsefit.reporting import run_tables, sentences

Part = Literal["model", "base", "adapter"]
"""The part of a run that a card describes; each is a folder of the run."""
_FILES = {
    "model": ("the recovered model, in which the pruned weights are zero", ("merged", "recovered")),
    "base": ("the pruned model before recovery training", ("reconstructed", "pruned")),
    "adapter": ("the trained adapter without the model: load it onto the pruned model of the same run", ("recovered",)),
}
_VERSIONS = ("sparsefit", "torch", "transformers", "peft")


def model_card(report: Mapping[str, Any], part: Part | None = None, library: str | None = None) -> str:
    """A run's report as a model card; whatever the report lacks is left out.

    Args:
        report: The content of `report.json`.
        part: The part of the run that the card describes; None for the whole run.
        library: The hub's name of the library that loads these files.
    """
    from huggingface_hub import ModelCard, ModelCardData

    about, asked = reading.section(report, "model"), reading.section(report, "pruning", "config")
    data = ModelCardData(
        base_model=about.get("name") if about.get("hub") else None,
        library_name=library,
        tags=["sparsefit", "pruning", *filter(None, [asked.get("score"), asked.get("pattern")])],
    )
    versions = reading.section(report, "versions")
    text = _template().render(
        front_matter=data.to_yaml(),
        name=report.get("name") or "run",
        lines=list(_lines(report, part)),
        tables=[run_tables.quality(report), run_tables.layer_types(report), run_tables.costs(report)],
        command=report.get("command"),
        versions=", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions),
    )
    return ModelCard(text).content  # this parses the front matter, as the hub will


def _lines(report: Mapping[str, Any], part: Part | None) -> Iterator[str]:
    if report.get("status") != "finished":
        yield f"**The run that wrote these files has not finished ({report.get('status') or 'unknown'}).**"
    if name := reading.section(report, "model").get("name"):
        yield f"A pruned `{name if report['model'].get('hub') else PurePath(name).name}`."
    if part is not None:
        what, stages = _FILES[part]
        measured = {stage for metric in reading.metrics(report) for stage in reading.metric_values(report, metric)}
        column = next((f": `{stage}` in the table of quality" for stage in stages if stage in measured), "")
        yield f"These files are {what}{column}."
    for line in (*sentences.pruning(report), *sentences.recovery(report)):
        yield f"- {line}"


@functools.cache
def _template() -> Template:
    loader = PackageLoader("sparsefit.reporting")
    # Markdown: nothing is escaped
    plain = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return plain.get_template("card.md")
