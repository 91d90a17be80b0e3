"""The folder of a study: its table, its report, the models trained for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.reporting.report import read_json, write_json, write_text
from sparsefit.reporting.study_figures import study_figures
from sparsefit.reporting.study_page import render_study
from sparsefit.study.results import Results, Row

_TIMED = ("selection", "evaluation", "finetuning")
# What may change where a study goes on: which points there are.
_OPEN = ("study", "grid.", "trainer", "config", "finetuning.epochs", "finetuning.sparsities", "finetuning.scores")
_OPEN += ("finetuning.granularities",)


class StudyFolder:
    """Where a study keeps what it has found: `results.csv`, `study.json`, `study.html`, `figures/`, `models/`.

    Args:
        path: The folder; new, empty, or of this study.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table, self.json, self.page = path / "results.csv", path / "study.json", path / "study.html"
        self._before: dict[str, Any] = {}
        self._results: Results | None = None

    def model_file(self, name: str) -> Path:
        """Where the dense weights of a model that was trained for the study are."""
        return self.path / "models" / f"{name}.safetensors"

    def results(self, metrics: Iterable[str]) -> Results:
        """The table, one for all models, for what they measure."""
        if self._results is None:
            self._results = Results(self.table, metrics)
        return self._results

    @property
    def rows(self) -> list[Row]:
        """The rows of the table, as far as it has been opened."""
        return [] if self._results is None else self._results.rows

    def open(self, config: str) -> dict[str, Any]:
        """What is known of the study so far; nothing where it is new.

        Args:
            config: Its settings now, as YAML.

        Raises:
            RunFolderError: If the folder holds something else.
            ConfigError: If it holds a study of other models or data, before anything is changed.
        """
        if self.json.exists():
            self._before = read_json(self.json)
            _check_same(yaml.safe_load(str(self._before.get("config", ""))) or {}, yaml.safe_load(config), self.path)
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunFolderError(
                f"{self.path} is not empty and holds no study: give the study a folder of its own (study.folder)"
            )
        return {"models": {}} | self._before

    def write(self, about: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Write the report, with the seconds of now added to those of before; returns all that it tells of."""
        rows = self.rows
        spent = {stage: sum(row[f"{stage}_seconds"] or 0.0 for row in rows) for stage in _TIMED}
        for kind in ("calibration", "training"):
            spent[kind] = sum((model.get(kind) or {}).get("seconds", 0.0) for model in about["models"].values())
        before = (self._before.get("seconds") or {}).values()
        spent["other"] = max(0.0, sum(before) + seconds - sum(spent.values()))
        whole = {**about, "seconds": spent, "folder": str(self.path)}
        write_json(whole, self.json)
        if rows:
            write_text(render_study(whole, rows), self.page)
            for stem, figure in study_figures(whole, rows).items():
                write_text(figure, self.path / "figures" / f"{stem}.svg")
        return whole


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    was, is_now = dict(_leaves(before)), dict(_leaves(now))
    models = {name for name in before.get("models") or {} if name in (now.get("models") or {})}
    names = [name for name in {**was, **is_now} if was.get(name) != is_now.get(name) and not name.startswith(_OPEN)]
    for name in names:
        if name.startswith("models.") and not any(name.startswith(f"models.{model}.") for model in models):
            continue  # a model more, or one less
        raise ConfigError(
            f"{path} holds a study with {name} {was.get(name)!r}, and now it is {is_now.get(name)!r}: results of both "
            "must not be mixed. Give the study another folder (study.folder), or the setting of before"
        )


def _leaves(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif settings not in (None, {}):
        yield name, settings
