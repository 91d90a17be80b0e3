"""Zero-shot tasks in the report of a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from small_runs import LanguageModel, fit, text

from sparsefit.callbacks import GPUHourBudget, RunReport, WandaPruning, zero_shot_tasks
from sparsefit.errors import ConfigError
from sparsefit.evaluation.zero_shot import load_tasks, zero_shot
from sparsefit.modules import CausalLMModule
from sparsefit.modules.loading import load_causal_lm, load_tokenizer
from sparsefit.recovery.adapters import AdapterSettings

pytestmark = pytest.mark.slow

ITEM = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}
STAGES = ["dense", "pruned", "recovered"]


class TextData(LightningDataModule):
    def train_dataloader(self):
        return text(8)

    def test_dataloader(self):
        return text(4, seed=1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/rte.jsonl").write_text(4 * (json.dumps(ITEM) + "\n"))
    return tmp_path / "tasks"


@pytest.fixture
def scripted(monkeypatch):
    """Tasks with given results that take some time, so that a run needs no lm-eval."""
    calls = []

    def measure(model, tokenizer, tasks, limit, batch_size, progress):
        calls.append(SimpleNamespace(model=model, tokenizer=tokenizer, limit=limit, batch_size=batch_size))
        progress(1)
        acc = 0.9 - 0.1 * len(calls)
        return {"rte": {"acc": acc, "acc_stderr": 0.05, "items": 4, "version": 1.0, "truncated": 0}}

    monkeypatch.setattr(zero_shot_tasks, "load_tasks", lambda names, folder: dict.fromkeys(names))
    monkeypatch.setattr(zero_shot_tasks, "zero_shot", measure)
    return calls


def module(adapter=None):
    return CausalLMModule("tiny-llama", adapter, learning_rate=0.01)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_models_of_a_run(tmp_path, folder, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sparsefit[tasks]'")
    trained = module(AdapterSettings("masked_lora", r=2))
    tasks = {"tasks": ["rte"], "tasks_folder": str(folder), "tasks_limit": 3}
    fit(trained, TextData(), RunReport(str(tmp_path / "run"), **tasks), WandaPruning(), GPUHourBudget(1.0))

    found = report_of(tmp_path / "run")
    assert list(found["tasks"]) == sorted(STAGES)
    loaded = load_tasks(["rte"], folder)
    dense = load_causal_lm("tiny-llama")
    for stage, model in (("dense", dense), ("recovered", trained.model)):
        expected = zero_shot(model, load_tokenizer("tiny-llama"), loaded, limit=3)["rte"]
        assert {**expected, "source": None} == {**found["tasks"][stage]["rte"], "source": None}
    assert found["metrics"] == {"perplexity": "lower", "zero_shot_accuracy": "higher"}
    assert list(found["zero_shot_accuracy"]) == sorted(STAGES)
    assert found["seconds"]["stages"]["zero-shot tasks"] > 0
    assert "rte acc" in capsys.readouterr().out


def test_each_model_is_measured_as_it_is(tmp_path, scripted, capsys):
    trained = module(AdapterSettings(r=2))
    report = RunReport(str(tmp_path / "run"), tasks=["rte"], tasks_limit=7, tasks_batch_size=3)
    fit(trained, TextData(), report, WandaPruning())
    assert len(scripted) == 3
    assert all(call.model is trained.model and call.tokenizer is trained.tokenizer for call in scripted)
    assert {(call.limit, call.batch_size) for call in scripted} == {(7, 3)}

    found = report_of(tmp_path / "run")
    assert found["zero_shot_accuracy"] == pytest.approx({"dense": 0.8, "pruned": 0.7, "recovered": 0.6})
    moments = [entry["stage"] for entry in found["timeline"] if entry["metric"] == "zero_shot_accuracy"]
    assert moments == STAGES
    printed = " ".join(capsys.readouterr().out.split())
    assert "zero_shot_accuracy 80.00% 70.00% 60.00% -100.0%" in printed
    assert "rte acc 80.00% 70.00% 60.00% -100.0%" in printed
    page = (tmp_path / "run/report.html").read_text()
    assert "<h2>Zero-shot tasks</h2>" in page
    assert "80.00% ± 5.00" in page


def test_the_budget_keeps_their_time(tmp_path, scripted, monkeypatch):
    kept = []
    monkeypatch.setattr(GPUHourBudget, "keep", lambda self, seconds, stage: kept.append(seconds))
    report = RunReport(str(tmp_path / "run"), tasks=["rte"])
    without = report._seconds | {zero_shot_tasks.LEDGER_STAGE: 0.0}
    measure = report.tasks.measure

    def slow(*args, **kwargs):
        report._seconds |= {zero_shot_tasks.LEDGER_STAGE: 1000.0}
        return measure(*args, **kwargs)

    report.tasks.measure = slow
    fit(module(AdapterSettings(r=2)), TextData(), report, WandaPruning(), GPUHourBudget(1.0))
    assert without.keys() == report._seconds.keys()
    assert 2 * 1250 <= kept[0] < 2 * 1250 + 600  # before the pruning: of the pruned model and of the recovered one
    assert 1250 <= kept[-1] < 1250 + 600  # before training: of the recovered one


def test_a_run_without_tasks_says_nothing_of_them(tmp_path):
    fit(module(AdapterSettings(r=2)), TextData(), RunReport(str(tmp_path / "run")), WandaPruning())
    found = report_of(tmp_path / "run")
    assert "tasks" not in found
    assert found["metrics"] == {"perplexity": "lower"}
    assert "Zero-shot" not in (tmp_path / "run/report.html").read_text()


def test_what_cannot_be_measured_is_refused_before_anything(tmp_path, tiny_model, scripted):
    class Untokenized(LanguageModel):
        pass

    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="Untokenized has no `tokenizer`"):
        fit(Untokenized(tiny_model("llama")), TextData(), RunReport(str(run), tasks=["rte"]), WandaPruning())
    plain = LanguageModel(torch.nn.Linear(2, 2))
    plain.tokenizer = "a tokenizer"
    with pytest.raises(ConfigError, match="has no model of transformers"):
        fit(plain, TextData(), RunReport(str(run), tasks=["rte"]), WandaPruning())
    assert not run.exists()
    with pytest.raises(ConfigError, match="there is a folder of tasks"):
        RunReport(str(run), tasks_folder="tasks")
    with pytest.raises(ConfigError, match="limit is 0"):
        RunReport(str(run), tasks=["rte"], tasks_limit=0)


def test_a_resumed_run_keeps_what_was_measured(tmp_path, scripted):
    callbacks = RunReport(str(tmp_path / "run"), tasks=["rte"]), WandaPruning()
    trainer = fit(module(AdapterSettings(r=2)), TextData(), *callbacks, max_steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = report_of(tmp_path / "run")["tasks"]

    callbacks = RunReport(str(tmp_path / "run"), tasks=["rte"]), WandaPruning()
    fit(module(AdapterSettings(r=2)), TextData(), *callbacks, max_steps=2, ckpt_path=str(tmp_path / "last.ckpt"))
    found = report_of(tmp_path / "run")["tasks"]
    assert len(scripted) == 4  # only the recovered model was measured again
    assert (found["dense"], found["pruned"]) == (before["dense"], before["pruned"])
    assert found["recovered"] != before["recovered"]
