"""Runs sparsefit commands on a tiny model, in forked processes."""

from __future__ import annotations

import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from faults.write_hook import Writes
from sparsefit.cli import fit, merge  # noqa: F401 (imported once for all forked processes)
from sparsefit.cli import main as run_command
from sparsefit.data import TextFilesDataModule  # noqa: F401
from sparsefit.modules.loading import load_tokenizer

STEPS = 4
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards read the documentation of python aloud"
WORDS = TEXT.split(" ")
REPORTED = (1, 2)  # exit statuses of commands that end with a message


class ForkedCommands:
    """A tiny model, its text, and commands on it. Each runs in a forked process, which starts fast.

    Args:
        folder: The folder for the model, its text and the runs.
        steps: Optimizer steps of each run.
    """

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        self.folder, self.steps = folder, steps
        self.output = ""
        self._outputs: dict[int, int] = {}  # pipes by process; unlike files they work on a full disk
        tokenizer = load_tokenizer("tiny-llama")
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for part in ("train", "test"):
            (folder / part).mkdir()
            for number in range(4):
                text = " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(200))
                (folder / part / f"{number}.txt").write_text(text + part)

    def recipe(self, run: Path) -> Path:
        """Write the recipe of a run. Returns its file."""
        common = {"tokenizer": str(self.folder / "model"), "sequence_length": 16, "batch_size": 2, "shuffle_buffer": 5}
        sources = {f"{part}_source": str(self.folder / part) for part in ("train", "test")}
        adapter = {"r": 2, "dropout": 0.1, "form": "masked_lora", "target_modules": ["q_proj"]}
        saver = {"dirpath": str(run / "checkpoints"), "save_last": True, "enable_version_counter": False}
        saver |= {"every_n_train_steps": 2, "save_on_exception": True}
        settings = {
            "seed_everything": 3,
            "model": {
                "class_path": "sparsefit.modules.CausalLMModule",
                "init_args": {"model": str(self.folder / "model"), "learning_rate": 0.01, "adapter": adapter},
            },
            "data": {
                "class_path": "sparsefit.data.TextFilesDataModule",
                "init_args": common | sources | {"calibration_samples": 2, "calibration": "pack", "test_windows": 1},
            },
            "budget": {"gpu_hours": 10.0, "drive_learning_rate": False},
            "run": {"folder": str(run)},
            "trainer": {
                "accelerator": "cpu", "max_steps": self.steps, "log_every_n_steps": 1, "enable_progress_bar": False,
                "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver}],
            },
        }  # fmt: skip
        file = self.folder / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    def start(
        self,
        *arguments: Any,
        hook: Writes | None = None,
        file_size: int | None = None,
        before: Callable[[], None] | None = None,
    ) -> int:
        """Start a command in a new process and return the id of the process.

        Args:
            arguments: The arguments of `sparsefit`.
            hook: Counts the writes of the process, and acts at one of them.
            file_size: The largest size of a file that the process can write.
            before: Called in the process before the command starts.
        """
        output, log = os.pipe()
        if (child := os.fork()) == 0:
            status = 70
            try:
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
                os.chdir(self.folder)
                sys.argv = ["sparsefit", *map(str, arguments)]
                if file_size is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
                if hook is not None:
                    sys.addaudithook(hook)
                if before is not None:
                    before()
                status = run_command()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                try:
                    if hook is not None:
                        hook.at = sys.maxsize
                        (self.folder / "count.txt").write_text(str(hook.count))
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(status)  # the child must never run the code of its parent
        os.close(log)
        self._outputs[child] = output
        return child

    def wait(self, child: int) -> int:
        """Wait for the end of a command. Returns its exit status, or minus the number of the signal that killed it."""
        with open(self._outputs.pop(child), errors="replace") as output:
            self.output = output.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def run(self, *arguments: Any, **settings: Any) -> int:
        """Run a command to its end and return its status."""
        return self.wait(self.start(*arguments, **settings))

    def reported(self, status: int) -> bool:
        """Whether the last command ended with a message, not with a traceback or in silence."""
        return status in REPORTED and "Traceback" not in self.output and bool(self.output.strip())

    def resume(self, run: Path) -> int:
        """Resume a run, or start it if it was killed before it wrote to its folder."""
        if (run / "config.yaml").exists():
            return self.run("fit", "--resume", run)
        return self.run("fit", "--config", self.recipe(run))
