"""Loggers that a `RunReport` names, in a loop of one's own."""

from __future__ import annotations

from small_runs import Classifier, fit, labelled

from sparsefit.callbacks import RunReport, WandaPruning


def test_they_are_added_to_those_of_the_trainer(tmp_path):
    report = RunReport(str(tmp_path / "run"), logger="csv")
    trainer = fit(Classifier(), labelled(), WandaPruning(0.5), report, max_steps=2, log_every_n_steps=1)
    assert len(trainer.loggers) == 1
    assert (tmp_path / "run/logs/csv/version_0/metrics.csv").read_text().startswith("pruning/")
