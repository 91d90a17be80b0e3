from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsefit.cli.resuming import check_checkpoint
from sparsefit.modules.loading import load_tokenizer
from sparsefit.pruning import MaskSet

pytestmark = pytest.mark.figures

# Without a recipe.


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_the_commands(sparsefit, arguments):
    status, output, _ = sparsefit(*arguments)
    assert status == 0
    assert all(f"{command} " in output for command in ("fit", "prune", "inspect"))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("prune", ["--stream", "--config", "--resume"]),
        ("plan", ["--gpu", "--config"]),
        ("evaluate", ["--tasks", "--perplexity"]),
        ("inspect", ["folder"]),
        ("merge", ["--reapply-masks"]),
        ("speed", ["--runtimes"]),
        ("export", ["--format"]),
        ("push", ["--private"]),
        pytest.param("fit", ["--config", "--resume", "--pruning.sparsity"], marks=pytest.mark.slow),
        pytest.param("study", ["--config", "--grid.sparsities"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("help_option", ["-h", "--help"])
def test_the_help_of_a_command_names_it_and_its_options(sparsefit, command, options, help_option):
    status, output, _ = sparsefit(command, help_option)
    assert status == 0
    assert output.startswith(f"usage: sparsefit {command} ")
    assert all(option in output for option in options)


def test_settings_before_a_help_option_do_not_matter(sparsefit):
    status, output, _ = sparsefit("plan", "--config", "nothing.yaml", "--help")
    assert (status, output.startswith("usage: sparsefit plan ")) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["prune", "--help"], ["plan", "--help"]])
def test_help_does_not_wait_for_slow_imports(arguments):
    heavy = "{'lightning', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)"
    run = f"sys.argv = {['sparsefit', *arguments]}; atexit.register(lambda: print({heavy})); main()"
    code = f"import atexit, sys; from sparsefit.cli import main; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: sparsefit ")
    assert done.stdout.endswith("set()\n")


@pytest.mark.slow
def test_the_installed_command_prints_its_version():
    command = Path(sys.executable).with_name("sparsefit")
    if not command.exists():
        pytest.skip("the command is not installed for this Python")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.count(".") == 2


def test_an_unknown_command(sparsefit):
    status, _, errors = sparsefit("train")
    assert status == 2
    assert "no command 'train'" in errors
    assert "inspect FOLDER" in errors


def test_inspecting_what_is_not_there(sparsefit, tmp_path):
    status, _, errors = sparsefit("inspect", tmp_path / "nothing")
    assert status == 2
    assert "there is no folder" in errors


# Recipes that cannot work.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("pruning", "sparsty", 0.5, "sparsty"),
        ("trainer", "max_stepz", 1, "max_stepz"),
        ("", "budgets", {"gpu_hours": 1.0}, "budgets"),
        ("model.init_args", "learning_rat", 1, "learning_rat"),
        ("data.init_args", "train_sources", "x", "train_sources"),
        ("pruning", "sparsity", "half", "sparsity"),
    ],
)
def test_unknown_and_wrong_settings_are_named(sparsefit, recipe, tmp_path, section, key, value, message):
    place = recipe
    for part in filter(None, section.split(".")):
        place = place[part]
    place[key] = value
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 2
    assert message in errors
    assert not (tmp_path / "run").exists()


def wrong_model(recipe, folder):
    recipe["model"]["init_args"]["model"] = str(folder / "modle")
    return "ConfigError: there is no folder"


def wrong_sparsity(recipe, folder):
    recipe["pruning"]["sparsity"] = 1.5
    return "sparsity is 1.5"


def wrong_text(recipe, folder):
    recipe["data"]["init_args"]["train_source"] = str(folder / "nothing.txt")
    return "DataError: there is no file"


def wrong_tokenizer(recipe, folder):
    tokenizer = load_tokenizer("tiny-llama")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder / "other")
    recipe["data"]["init_args"]["tokenizer"] = str(folder / "other")
    return "vocabularies differ"


def file_in_place(recipe, folder):
    (folder / "run").write_text("mine")
    return "RunFolderError: the run folder"


def used_folder(recipe, folder):
    (folder / "run").mkdir()
    (folder / "run/thesis.txt").write_text("mine")
    return "exists and is not empty"


def no_checkpoint(recipe, folder):
    recipe["ckpt_path"] = str(folder / "none.ckpt")
    return "ConfigError: there is no checkpoint"


def damaged_checkpoint(recipe, folder):
    torch.save({"state_dict": torch.ones(1000)}, folder / "cut.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "cut.ckpt").read_bytes()[:-200])
    recipe["ckpt_path"] = str(folder / "cut.ckpt")
    return "is damaged: it cannot be read"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil",
    [
        wrong_model,
        wrong_sparsity,
        wrong_text,
        wrong_tokenizer,
        file_in_place,
        used_folder,
        no_checkpoint,
        damaged_checkpoint,
    ],
)
def test_a_recipe_that_cannot_work_says_so_and_leaves_nothing(sparsefit, recipe, tmp_path, spoil):
    message = spoil(recipe, tmp_path)
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == ({"thesis.txt"} if spoil is used_folder else set())


def test_a_checkpoint_with_objects_of_the_users_own_is_not_called_damaged(tmp_path):
    torch.save({"hyper_parameters": {"folder": tmp_path}}, tmp_path / "own.ckpt")
    check_checkpoint(tmp_path / "own.ckpt")
    assert torch.load(tmp_path / "own.ckpt", weights_only=False) == {"hyper_parameters": {"folder": tmp_path}}


# Recipes that work.


@pytest.mark.slow
def test_a_recipe_from_start_to_resumed_end(sparsefit, recipe, tmp_path):
    run = tmp_path / "run"
    status, output, _ = sparsefit("fit", recipe=recipe)
    assert status == 0
    report = json.loads((run / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["training"]["steps"] == 3
    assert report["sparsity"]["total"] == 0.5
    assert set(report["perplexity"]) == {"dense", "pruned", "recovered"}
    assert report["metrics"] == {"perplexity": "lower"}
    assert "50.00%" in output
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert report["configuration"] == (run / "config.yaml").read_text()
    assert settings["data"]["init_args"]["calibration_samples"] == 6
    MaskSet.load(run / "masks.safetensors").verify(AutoModelForCausalLM.from_pretrained(run / "base"))
    assert (run / "checkpoints/last.ckpt").exists()
    assert list((run / "logs").rglob("metrics.csv"))
    assert not list(tmp_path.glob("*/lightning_logs"))

    status, output, _ = sparsefit("inspect", run)
    assert (status, "masks hold" in output) == (0, True)

    # The same command again would overwrite the run; going on from its checkpoint does not.
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert (status, "not empty" in errors) == (2, True)
    more = (f"--ckpt_path={run}/checkpoints/last.ckpt", "--trainer.max_steps=5")
    status, _, errors = sparsefit("fit", *more, recipe=recipe)
    assert status == 0, errors
    resumed = json.loads((run / "report.json").read_text())
    assert resumed["training"]["steps"] == 5
    assert [entry["step"] for entry in resumed["training"]["history"]] == [1, 2, 3, 4, 5]
    assert resumed["perplexity"]["dense"] == report["perplexity"]["dense"]
    assert resumed["pruning"]["digest"] == report["pruning"]["digest"]
    assert resumed["sparsity"]["total"] == 0.5
    pruned_once = report["gpu_hours"]["stages"]["calibration and pruning"]
    assert resumed["gpu_hours"]["stages"]["calibration and pruning"] == pytest.approx(pruned_once)


def test_pruning_alone_and_settings_on_the_command_line(sparsefit, recipe, tmp_path):
    del recipe["model"]["init_args"]["adapter"]
    status, *_ = sparsefit("prune", "--pruning.pattern=2:4", "--run.name", "two of four", recipe=recipe)
    assert status == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert (report["name"], report["training"]["steps"]) == ("two of four", 0)
    assert set(report["perplexity"]) == {"dense", "pruned"}
    weight = load_file(tmp_path / "run/base/model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert ((weight.view(16, 8, 4) != 0).sum(-1) == 2).all()
    assert not (tmp_path / "run/adapter").exists()


def test_a_recipe_printed_is_a_recipe(sparsefit, recipe):
    status, output, _ = sparsefit("fit", "--print_config", recipe=recipe)
    assert status == 0
    assert "gpu_hours: 1.0" in output
