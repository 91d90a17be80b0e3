"""The folder of a study: its table, its report, and the models trained for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.files import lock_folder, write_text
from sparsefit.reporting.pages import render_study
from sparsefit.reporting.report import read_json, write_json
from sparsefit.reporting.study_figures import study_figures
from sparsefit.reporting.study_tables import summary_csv
from sparsefit.study.results import Results, Row

_TIMED = ("selection", "evaluation", "finetuning")
# Settings that may change in a continued study: they select the points, or have no effect on results.
_MAY_CHANGE = {
    "grid": {"scores", "granularities", "sparsities", "patterns", "updates"},
    "data": {"init_args.num_workers", "init_args.evaluation_batch_size", "init_args.calibration_batch_size"},
    "finetuning": {"epochs", "sparsities", "scores", "granularities", "seeds"},
    "trainer": {
        *("accelerator", "devices", "num_nodes", "strategy", "logger", "profiler", "default_root_dir", "benchmark"),
        *("log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "barebones"),
    },
}


class StudyFolder:
    """The files of a study: `results.csv` (a row for each run), `summary.csv` (means over seeds), `study.json`,
    `study.html`, `figures/`, `models/`.

    Args:
        path: The folder: new, empty, or of this study.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table, self.json, self.page = path / "results.csv", path / "study.json", path / "study.html"
        self._before: dict[str, Any] = {}
        self._results: Results | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, so that no other process uses it.

        Raises:
            RunFolderError: if another study uses it, it holds other files, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]
            if names and not self.json.exists():
                raise RunFolderError(
                    f"{self.path} is not empty and holds no study: give the study a folder of its own (study.folder)"
                )
            lock = lock_folder(self.path, "study")
        except RunFolderError:
            raise
        except OSError as error:
            raise RunFolderError(f"the study folder {self.path} cannot be used: {error}") from error
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def model_file(self, name: str) -> Path:
        """File of a trained model's dense weights."""
        return self.path / "models" / f"{name}.safetensors"

    def results(self, metrics: Iterable[str]) -> Results:
        """The table of all models, with these metrics."""
        if self._results is None:
            self._results = Results(self.table, metrics)
        return self._results

    @property
    def rows(self) -> list[Row]:
        """The rows of the table; none before `results` was called."""
        return [] if self._results is None else self._results.rows

    def open(self, config: str) -> dict[str, Any]:
        """Read the saved study; without models if it is new.

        Args:
            config: The current settings, as YAML.

        Raises:
            RunFolderError: if its files are damaged.
            ConfigError: if it was made with other data or trainings. Nothing is changed then.
        """
        if self.json.exists():
            self._before = self._read()
            if self.table.exists() or any(self.path.glob("models/*")):
                self._check(yaml.safe_load(str(self._before.get("config", ""))) or {}, yaml.safe_load(config))
        return {"models": {}} | self._before

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        trains = [any(_epochs(config, part) for part in ("training", "finetuning")) for config in (before, now)]
        tunes = [_epochs(config, "finetuning") for config in (before, now)]
        compared = ["seed_everything", "data", "grid", "training"]
        compared += ["finetuning"] * all(tunes) + ["trainer"] * all(trains)
        check_same_settings(_determining(before, compared), _determining(now, compared), "", self.path)
        for name, model in (self._before.get("models") or {}).items():
            if name in now["models"] and "settings" in model:  # its results were made with these settings
                check_same_settings(model["settings"], now["models"][name], f"models.{name}", self.path)

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self.json)
        except RunFolderError as error:
            raise RunFolderError(
                f"{self.json} is damaged: move {self.path} away, or give the study another folder (study.folder)"
            ) from error

    def write(self, about: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Write the report, adding this process's seconds; return its entries."""
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
            write_text(summary_csv(whole, rows), self.path / "summary.csv")
            for stem, figure in study_figures(whole, rows).items():
                write_text(figure, self.path / "figures" / f"{stem}.svg")
        return whole


def check_same_settings(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str, path: Path) -> None:
    """Check that the settings are those of a study's earlier rows.

    Raises:
        ConfigError: for the first setting that differs, with both values.
    """
    was, is_now = dict(_leaves(before, prefix)), dict(_leaves(now, prefix))
    for name in {**was, **is_now}:
        if was.get(name) != is_now.get(name):
            raise ConfigError(
                f"{path} holds a study with {name} {was.get(name)!r}, and now it is {is_now.get(name)!r}: their "
                "results must not be mixed. Give the study another folder (study.folder), or use the earlier setting"
            )


def _epochs(config: Mapping[str, Any], part: str) -> int:
    return (config.get(part) or {}).get("epochs", 0)


def _determining(config: Mapping[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """The settings that determine the rows, by their full names, without those of the models."""
    return {
        name: value
        for section in sections
        for name, value in _leaves(config.get(section), section)
        if name.removeprefix(f"{section}.") not in _MAY_CHANGE.get(section, ())
    }


def _leaves(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif settings not in (None, {}):
        yield name, settings
