"""A small recipe, and the command that runs it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import yaml
from tiny_models import save_llama

from sparsefit.cli import main

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards read the documentation of python aloud"


@pytest.fixture(autouse=True)
def lightning_speaks() -> Iterator[None]:
    """A study hushes Lightning for as long as its process lives: here that is the process of other tests, too."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny Llama and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, model):
    """A recipe on text files, as a dictionary to change; with the folder that it is written to."""
    words = WORDS.split()
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for number in range(4):
            text = " ".join(words[(number + i * i) % len(words)] for i in range(300))
            (tmp_path / part / f"{number}.txt").write_text(text + part)
    return {
        "model": {
            "class_path": "sparsefit.modules.CausalLMModule",
            "init_args": {"model": str(model), "learning_rate": 0.01, "adapter": {"r": 2, "dropout": 0.0}},
        },
        "data": {
            "class_path": "sparsefit.data.TextFilesDataModule",
            "init_args": {
                "tokenizer": str(model),
                "train_source": str(tmp_path / "train"),
                "test_source": str(tmp_path / "test"),
                "sequence_length": 16,
                "batch_size": 2,
                "calibration_samples": 6,
                "test_windows": 6,
                "calibration": "pack",
            },
        },
        "pruning": {"sparsity": 0.5},
        "budget": {"gpu_hours": 1.0},
        "run": {"folder": str(tmp_path / "run")},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1, "enable_progress_bar": False},
    }


@pytest.fixture
def sparsefit(tmp_path, monkeypatch, capsys):
    """Runs the command in this process: status, output and errors, their white space made single."""

    def run(*arguments, recipe=None):
        if recipe is not None:
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            arguments = (arguments[0], "--config", tmp_path / "recipe.yaml", *arguments[1:])
        monkeypatch.setattr(sys, "argv", ["sparsefit", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        return status, *(" ".join(text.split()) for text in capsys.readouterr())

    return run
