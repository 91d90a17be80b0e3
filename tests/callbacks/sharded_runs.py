"""Runs of a small Llama that the tests of sharded recovery share: the same ones on one device and on several."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from sharded_fits import sharded, whole_weights
from small_runs import QUIET
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefit.callbacks import GPUHourBudget, RunReport, WandaPruning
from sparsefit.modules import CausalLMModule
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings

GLOBAL_BATCH = 4
SIZES = {"hidden_size": 20, "intermediate_size": 33, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 61}


class Windows(LightningDataModule):
    """Rows of tokens in a fixed order, which the ranks share out: their global batches are those of one rank."""

    def train_dataloader(self):
        return rows(24, 0, GLOBAL_BATCH, self.trainer.global_rank, self.trainer.world_size)

    def calibration_dataloader(self):
        return rows(8, 1, 2)

    def test_dataloader(self):
        return rows(6, 2, 3)


def rows(count: int, seed: int, batch: int, rank: int = 0, ranks: int = 1) -> DataLoader:
    ids = torch.randint(3, 61, (count, 12), generator=torch.Generator().manual_seed(seed))
    return DataLoader([{"input_ids": row} for row in ids[rank::ranks]], batch_size=batch // ranks)


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).to(dtype)


def module(form: str | None = "masked_lora", distill: bool = False, dtype: str = "float32", **changes: Any):
    own = {key: changes.pop(key) for key in ("learning_rate", "gradient_checkpointing") if key in changes}
    settings = {"r": 2, "dropout": 0.0, "target_modules": "all-linear"} | changes
    adapter = AdapterSettings(form, **settings) if form else None
    torch.manual_seed(1)
    built = CausalLMModule(
        llama(getattr(torch, dtype)),
        adapter,
        DistillSettings(0.5) if distill else None,
        **({"learning_rate": 0.01} | own),
    )
    return built


def run(
    ranks: int, folder: Path, built: CausalLMModule, masks: dict | None = None, more: tuple = (), data=None, **settings: Any
) -> dict[str, Any]:
    """Fit on so many ranks (this process being one), and what came of it."""
    pruning, report = WandaPruning(), RunReport(str(folder))
    if masks is not None:
        pruning.masks = MaskSet.from_state_dict(masks)
        pruning.masks.apply(built)
        pruning.summary = {"config": {"pattern": None, "sparsity": 0.5}, "seconds": 0}
    common = {"max_steps": 4, "gradient_clip_val": 0.5, "use_distributed_sampler": False} | (
        sharded(ranks) if ranks > 1 else {}
    )
    trainer = Trainer(callbacks=[GPUHourBudget(1.0), report, pruning, *more], **(QUIET | common | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(built, data or Windows())
    return {
        "weights": whole_weights(built),
        "masks": pruning.masks.state_dict(),
        "report": report.report,
        "steps": trainer.global_step,
    }
