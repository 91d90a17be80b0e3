"""scripts/reproduce/recovery.py: what its seconds contain, and points with few or no steps."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import save_llama

from sparsefit.data import PythonDocsDataModule

SCRIPTS = Path(__file__).parents[1] / "scripts" / "reproduce"


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """The modules of the points and of the tables, with a random model of two blocks as "embedded"."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    fits, tables = import_module("recovery_fits"), import_module("recovery")
    folder = str(tmp_path / "model")
    save_llama(folder)
    sizes = {"sequence_length": 24, "calibration_samples": 2, "test_windows": 2, "batch_size": 2}
    data = PythonDocsDataModule(folder, calibration="pack", **sizes)
    forget = fits.data_of.cache_clear
    forget()
    subject = replace(fits.SUBJECTS["embedded"], model=folder, data=lambda seed: data)
    monkeypatch.setitem(fits.SUBJECTS, "embedded", subject)
    yield fits, tables
    forget()


@pytest.fixture
def slow_to_prepare(scripts, monkeypatch):
    """A clock that stands still, except that reading the data and making a base take 1000 s each."""
    fits, _ = scripts
    now = 0.0
    monkeypatch.setattr(fits, "time", SimpleNamespace(perf_counter=lambda: now))

    def slowly(function, done):
        def call(*arguments):
            nonlocal now
            now += 0.0 if done(*arguments) else 1000.0
            return function(*arguments)

        return call

    read = set()

    def is_read(*arguments):
        was = arguments in read
        read.add(arguments)
        return was

    monkeypatch.setattr(fits, "prepare", slowly(fits.prepare, lambda output, _: any(output.rglob("figures.json"))))
    monkeypatch.setattr(fits, "data_of", slowly(fits.data_of, is_read))


@pytest.mark.slow
@pytest.mark.usefixtures("slow_to_prepare")
def test_the_seconds_of_a_training_are_without_what_it_starts_from(scripts, tmp_path):
    fits, tables = scripts
    figures = fits.run(tmp_path, fits.point("embedded", "full", 1e-3, {"steps": 2}, passes=1))
    assert figures["training_seconds"] == 0.0
    assert figures["reconstruction_seconds"] > 0.0
    row = tables.table([figures | {"training_seconds": 50.0, "reconstruction_seconds": 7.0, "pruning_seconds": 3.0}])
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in row.splitlines()[::2]), strict=True))
    assert (cells["seconds"], cells["pruning s"]) == ("57", "3")


@pytest.mark.slow
def test_a_single_step_has_no_time(scripts, tmp_path):
    fits, _ = scripts
    figures = fits.cached(tmp_path, fits.point("embedded", "full", 1e-3, {"steps": 1}))
    assert (figures["steps_taken"], figures["step"]) == (1, None)


def test_a_reconstruction_that_takes_all_seconds_leaves_no_point(scripts, tmp_path, monkeypatch, capsys):
    _, tables = scripts
    monkeypatch.setattr(tables, "prepare", lambda output, point: (tmp_path, {"reconstruction_seconds": before(point)}))
    monkeypatch.setattr(tables, "pace", lambda *arguments: 2.0)

    def before(point):
        return 91.0 if point["passes"] else 0.0

    rates = dict.fromkeys(tables.FORMS, 1e-3)
    rows = tables.fitting(tmp_path, "embedded", rates, "50%")
    assert rows
    assert {(row["passes"], row["steps"], row["seconds"]) for row in rows} == {(0, 45, 90)}
    assert "full: left out, as -1 s of 90 s are left to train" in capsys.readouterr().out
