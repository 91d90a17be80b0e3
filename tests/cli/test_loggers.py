"""Loggers by their names in a recipe."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import yaml
from commands import Command

from sparsefit import RunReport
from sparsefit.callbacks.loggers import has_wandb_key
from sparsefit.errors import ConfigError

TIMED = {"created", "seconds", "gpu_hours", "memory", "timeline", "sha256", "page", "id", "configuration", "machine"}
WANDB = '''
"""Stands in for wandb: records its calls in a file."""
import json, os

class _Run:
    def __init__(self, directory, settings):
        self.file, self.id = open(os.path.join(directory, "calls.jsonl"), "a"), "0"
        self.config = self
        self.tell(init=settings)
    def tell(self, **values):
        self.file.write(json.dumps(values, default=str) + "\\n")
        self.file.flush()
    def update(self, values, **_):
        self.tell(config=values)
    def log(self, metrics, **_):
        self.tell(metrics=metrics)
    def define_metric(self, *_, **__):
        pass
    def finish(self):
        global run
        run = None

run = None

def init(**settings):
    global run
    run = _Run(settings["dir"], settings)
    return run
'''


def lasting(folder):
    """A run's report without what differs from run to run."""

    def kept(value):
        if isinstance(value, dict):
            return {key: kept(item) for key, item in value.items() if key not in (*TIMED, "peak_memory_bytes")}
        return [kept(item) for item in value] if isinstance(value, list) else value

    return kept(json.loads((folder / "report.json").read_text())) | {"command": None, "folder": None}


@pytest.mark.slow
def test_each_logger_gets_the_figures_and_the_report_is_the_same(sparsefit, recipe, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'sparsefit[tensorboard]'")
    reports = []
    for number, named in enumerate((None, "tensorboard", ["csv", "tensorboard"])):
        recipe["run"] = {"folder": str(tmp_path / f"run{number}"), "name": "mine", "logger": named}
        status, _, errors = sparsefit("fit", recipe=recipe)
        assert status == 0, errors
        logs = tmp_path / f"run{number}/logs"
        wanted = set([named] if isinstance(named, str) else named or [])
        assert {path.name for path in logs.iterdir()} == wanted if wanted else not logs.exists()
        assert bool(list(logs.rglob("events.*"))) == ("tensorboard" in wanted)
        reports.append(lasting(tmp_path / f"run{number}"))
    assert all(report == reports[0] for report in reports[1:])
    (table,) = logs.rglob("metrics.csv")
    rows = list(csv.DictReader(table.open()))
    reported = {name: float(row[name]) for row in rows for name in row if row[name] and "/" in name}
    for stage, value in reports[-1]["perplexity"].items():
        assert reported[f"perplexity/{stage}"] == pytest.approx(value)
    assert reported["pruning/sparsity"] == 0.5
    assert {"0", "1", "2"} <= {row["step"] for row in rows}


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_logged(sparsefit, recipe, tmp_path):
    assert sparsefit("fit", recipe=recipe)[0] == 0  # csv, without being asked
    (first,) = (tmp_path / "run").rglob("metrics.csv")
    before = first.read_text()
    assert sparsefit("fit", "--resume", tmp_path / "run", "--trainer.max_steps", "5")[0] == 0
    both = sorted((tmp_path / "run").rglob("metrics.csv"))
    assert both[0].read_text() == before
    assert {row["step"] for row in csv.DictReader(both[1].open())} >= {"4"}


@pytest.mark.slow
def test_wandb_is_offline_without_a_key(recipe, tmp_path):
    """In a process of its own, whose wandb is a stand-in."""
    stand_in = tmp_path / "stand_in/wandb"
    about = stand_in.with_name("wandb-1.0.dist-info")
    for part in (stand_in, stand_in / "sdk", about):
        part.mkdir(parents=True)
    (stand_in / "__init__.py").write_text(WANDB)
    (stand_in / "sdk/__init__.py").write_text("")
    (stand_in / "sdk/lib.py").write_text("class RunDisabled: pass\n")
    (stand_in / "wandb_run.py").write_text("from wandb import _Run as Run\n")
    (stand_in.with_name("wandb-1.0.dist-info") / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: wandb\nVersion: 1\n"
    )
    recipe["run"] |= {"name": "mine", "logger": "wandb"}
    recipe["control"] = True
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = (
        "import os, sys; sys.path.insert(0, 'stand_in')\n"
        "for name in list(os.environ):\n    if name.startswith('WANDB') or name == 'NETRC': del os.environ[name]\n"
        "from sparsefit.cli import main; sys.exit(main())\n"
    )
    (tmp_path / "run.py").write_text(code)
    command = ["python", tmp_path / "run.py", "fit", "--config", "recipe.yaml"]
    done = Command(command, tmp_path, {"HOME": str(tmp_path)}).wait()
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["control"]["status"] == "finished"

    def reported(folder):
        lines = map(json.loads, (tmp_path / "run" / folder / "calls.jsonl").read_text().splitlines())
        return [(key, value) for line in lines for key, value in line.items()]

    run, control = reported("logs"), reported("logs/control")
    assert run[0][1]["name"] == "mine"
    assert run[0][1]["project"] == "sparsefit"
    assert control[0][1]["name"] == "mine control"  # a run of its own
    assert run[0][1]["mode"] == control[0][1]["mode"] == "offline"
    metrics = {name: value for key, values in run if key == "metrics" for name, value in values.items()}
    assert metrics["perplexity/pruned"] == pytest.approx(report["perplexity"]["pruned"])
    assert not any("pruning/sparsity" in values for key, values in control if key == "metrics")


def test_the_key_of_wandb_is_found_where_it_may_be(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password 0\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "0")
    assert has_wandb_key()


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_anything_is_done(sparsefit, recipe, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    recipe["run"]["logger"] = ["csv", library]
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 2
    assert f"the logger {library} needs {library}, which is not installed: pip install 'sparsefit[{library}]'" in errors
    assert not (tmp_path / "run").exists()


def test_wrong_names(sparsefit, recipe):
    recipe["run"]["logger"] = "tensorbord"
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 2
    assert "run.logger is 'tensorbord': it must be one of 'csv', 'tensorboard', 'wandb'" in errors
    with pytest.raises(ConfigError, match="there is no logger 'tensorbord'"):
        RunReport("run", logger="tensorbord")


@pytest.mark.slow
def test_loggers_of_the_trainer_stay_and_false_is_none(sparsefit, recipe, tmp_path):
    own = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "own")}}
    recipe["trainer"]["logger"] = own
    assert sparsefit("prune", recipe=recipe)[0] == 0
    assert [len(list((tmp_path / place).rglob("metrics.csv"))) for place in ("own", "run")] == [1, 1]
    recipe["trainer"]["logger"] = False
    recipe["run"]["folder"] = str(tmp_path / "quiet")
    assert sparsefit("prune", recipe=recipe)[0] == 0
    assert not (tmp_path / "quiet/logs").exists()
