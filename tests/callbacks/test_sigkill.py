"""Runs that are killed at any moment, and go on from their last checkpoint."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from commands import Command
from resumed_runs import SIZES, assert_same, text_file, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

STEPS = 8

# Runs the command; with KILL_AT="n share", kills itself when the n-th checkpoint is written by so much.
SCRIPT = """
import os, signal, sys
from sparsefit.cli import main

number, share = (float(part) for part in os.environ.get("KILL_AT", "0 0").split())
if number:
    import torch
    save, saves = torch.save, []

    def save_and_die(checkpoint, file, **settings):
        save(checkpoint, file, **settings)
        saves.append(file)
        if len(saves) == number:
            file.flush()
            os.ftruncate(file.fileno(), int(share * file.tell()))
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_and_die
sys.exit(main())
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), **SIZES)).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "run.py").write_text(SCRIPT)
    return folder


def command(workplace, run, *arguments):
    text = {"train_source": text_file(workplace), "sequence_length": 16, "batch_size": 2, "shuffle_buffer": 5}
    saver = {"dirpath": str(run / "checkpoints"), "save_last": True, "enable_version_counter": False}
    recipe = {
        "seed_everything": 3,
        "model": {
            "class_path": "sparsefit.modules.CausalLMModule",
            "init_args": {
                "model": str(workplace / "model"),
                "learning_rate": 0.01,
                "adapter": {"r": 2, "dropout": 0.1},
            },
        },
        "data": {
            "class_path": "sparsefit.data.TextFilesDataModule",
            "init_args": text | {"tokenizer": str(workplace / "model"), "calibration_samples": 4, "calibration": "pack"}
            | {"test_source": text_file(workplace), "test_windows": 2},
        },
        "budget": {"gpu_hours": 10.0},
        "run": {"folder": str(run)},
        "trainer": {
            "accelerator": "cpu", "max_steps": STEPS, "max_epochs": 100, "log_every_n_steps": 1,
            "enable_progress_bar": False, "logger": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": saver | {"every_n_train_steps": 1},
                }
            ],
        },
    }  # fmt: skip
    run.parent.mkdir(exist_ok=True)
    file = workplace / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return ["python", workplace / "run.py", "fit", "--config", file, *arguments]


def started(workplace, run, *arguments, kill_at=""):
    environment = {"CUDA_VISIBLE_DEVICES": "", "KILL_AT": kill_at or "0 0"}
    return Command(command(workplace, run, *arguments), workplace, environment)


def resumed(workplace, run):
    """Goes on from the last checkpoint; the weights at the end, and the step that the checkpoint was from."""
    last = run / "checkpoints/last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    done = started(workplace, run, f"--ckpt_path={last}").wait()
    assert done.returncode == 0, done.stderr
    return ended(run), step


def ended(run):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    moments = checkpoint["optimizer_states"][0]["state"]
    return checkpoint["state_dict"] | {f"{n}.{k}": v for n, state in moments.items() for k, v in state.items()}


@pytest.fixture(scope="module")
def straight(workplace):
    run = workplace / "straight"
    done = started(workplace, run).wait()
    assert done.returncode == 0, done.stderr
    return ended(run)


@pytest.mark.parametrize(("number", "share"), [(4, 0.5), (7, 1.0)])
def test_killed_while_a_checkpoint_is_written(workplace, straight, number, share):
    run = workplace / f"written-{number}"
    killed = started(workplace, run, kill_at=f"{number} {share}").wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    base = {file: file.stat().st_mtime_ns for file in [*(run / "base").iterdir(), run / "masks.safetensors"]}
    assert list((run / "checkpoints").glob(".*.partial"))
    weights, step = resumed(workplace, run)
    assert step == (number - 2) // 2  # the start is the first file; each step writes two, last.ckpt being the second
    assert_same(weights, straight)
    assert not list((run / "checkpoints").glob(".*.partial"))
    assert all(file.stat().st_mtime_ns == time for file, time in base.items())


def test_killed_at_any_moment(workplace, straight):
    run, chance = workplace / "any", random.Random()
    command, last = started(workplace, run), run / "checkpoints/last.ckpt"
    while not last.exists() and command.process.is_alive():
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.3))
    command.process.kill()
    command.wait()
    weights, _ = resumed(workplace, run)
    assert_same(weights, straight)
    for file in Path(run / "checkpoints").glob("*.ckpt"):
        torch.load(file, weights_only=True)
