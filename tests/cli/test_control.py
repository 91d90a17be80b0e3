"""`control: true`: the dense model, trained with the same recipe for comparison."""

from __future__ import annotations

import json
import math

import pytest

from sparsefit.modules import CausalLMModule

pytestmark = pytest.mark.slow

TRAINER = {"max_steps": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}


@pytest.fixture
def run(sparsefit, recipe, tmp_path):
    """Runs the recipe with a control into a folder: the report, and what was printed."""
    recipe["control"] = True
    recipe["trainer"] |= TRAINER
    recipe["model"]["init_args"]["adapter"]["dropout"] = 0.2

    def run(name, *arguments, command="fit"):
        status, output, errors = sparsefit(command, f"--run.folder={tmp_path / name}", *arguments, recipe=recipe)
        assert status == 0, errors
        return json.loads((tmp_path / name / "report.json").read_text()), output

    return run


@pytest.mark.parametrize("form", ["lora", "full"])
def test_where_nothing_is_pruned_the_control_is_the_run(run, recipe, tmp_path, form):
    recipe["model"]["init_args"]["adapter"] |= {"form": form, "target_modules": "all-linear"}
    recipe["data"]["init_args"]["val_source"] = str(tmp_path / "test")
    recipe["trainer"]["val_check_interval"] = 2
    report, _ = run("run", "--pruning.sparsity=0.0")
    figures = report["perplexity"]
    assert figures["control"] == figures["recovered"] != figures["dense"]
    assert report["control"]["distance"]["perplexity"] == 0.0


def test_the_control_is_that_of_the_recipe_whatever_was_pruned_or_taught(run):
    whole, _ = run("whole", "--pruning.sparsity=0.0")
    expected = whole["perplexity"]["recovered"]
    half, output = run("half", "--pruning.sparsity=0.5", "--pruning.score=magnitude")
    taught, _ = run("taught", "--pruning.sparsity=0.5", "--model.init_args.distill.weight=0.5")
    assert half["perplexity"]["control"] == taught["perplexity"]["control"] == expected
    assert [report["control"]["without_teacher"] for report in (half, taught)] == [False, True]

    control, figures = half["control"], half["perplexity"]
    assert (control["status"], control["steps"]) == ("finished", half["training"]["steps"]) == ("finished", 3)
    distance = math.log(figures["recovered"]) - math.log(figures["control"])
    assert control["distance"]["perplexity"] == pytest.approx(distance, abs=1e-12) != 0.0
    assert control["gpu_hours"] == pytest.approx(control["seconds"] / 3600)
    assert not {"control", "fit"} & half["gpu_hours"]["stages"].keys()
    assert all(moment["stage"] != "control" for moment in half["timeline"])
    assert f"{distance:+.3f} nats" in output
    assert "control: finished, 3 steps" in output


def test_pruning_alone_has_no_control(run):
    report, _ = run("run", command="prune")
    assert "control" not in report
    assert "control" not in report["perplexity"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the disk of the control is full")])
def test_what_breaks_off_the_control_leaves_the_run(run, recipe, sparsefit, tmp_path, monkeypatch, error):
    expected, _ = run("whole")
    step, calls = CausalLMModule.training_step, []

    def break_off(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 2 * 3 + 3:  # the run takes six batches
            raise error
        return step(self, batch, batch_idx)

    folder = tmp_path / "broken"
    with monkeypatch.context() as patched:
        patched.setattr(CausalLMModule, "training_step", break_off)
        arguments = ("fit", f"--run.folder={folder}")
        if isinstance(error, KeyboardInterrupt):
            assert sparsefit(*arguments, recipe=recipe)[0] == 130
        else:
            with pytest.raises(RuntimeError, match="the disk of the control"):
                sparsefit(*arguments, recipe=recipe)
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["perplexity"]["recovered"] == expected["perplexity"]["recovered"]
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    assert "control" not in report["perplexity"]
    assert report["control"]["status"] == ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
    assert report["control"]["steps"] == 1

    # Going on from the end of the run trains the control again, by the rates and random numbers of all of the run.
    resumed, _ = run("broken", f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert resumed["perplexity"]["control"] == expected["perplexity"]["control"]
    assert resumed["perplexity"]["recovered"] == expected["perplexity"]["recovered"]
