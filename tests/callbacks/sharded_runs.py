"""Runs of small models for tests of sharded recovery, on one device and on several."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from sharded_fits import sharded, whole, whole_weights
from small_runs import QUIET, Net, labelled
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparsefit.bare_model import canonical_name
from sparsefit.callbacks import GPUHourBudget, PrunedRunCallback, RunReport, WandaPruning
from sparsefit.modules import CausalLMModule, RecoveryMixin, shard
from sparsefit.modules.text_generation import writing
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.sharded import shard_of

GLOBAL_BATCH = 4
# Widths that neither two nor four ranks share out evenly.
SIZES = {"hidden_size": 20, "intermediate_size": 33, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 61}
GPT2_SIZES = {"vocab_size": 61, "n_positions": 32, "n_embd": 20, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Shared(LightningDataModule):
    """Samples in a fixed order, divided among the ranks; together, their batches are those of one rank."""

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(self.samples(24, 0)[rank::ranks], batch_size=GLOBAL_BATCH // ranks)

    def calibration_dataloader(self):
        return DataLoader(self.samples(8, 1), batch_size=2)


class Windows(Shared):
    """Rows of tokens."""

    @staticmethod
    def samples(count, seed):
        ids = torch.randint(3, 61, (count, 12), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": row} for row in ids]

    def test_dataloader(self):
        return DataLoader(self.samples(6, 2), batch_size=3)


class Labelled(Shared):
    """Rows of numbers, with labels."""

    @staticmethod
    def samples(count, seed):
        return [*labelled(count, seed).dataset]

    def val_dataloader(self):
        return DataLoader(self.samples(8, 2), batch_size=4)


class Own(RecoveryMixin, LightningModule):
    """A custom module with its dense version as teacher."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.distill = DistillSettings(weight=0.5)

    def configure_model(self):
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh)

    def training_step(self, batch, batch_idx):
        taught = self.taught(self.net, batch[0])
        logits = self.net(batch[0])
        return self.distilled(nn.functional.cross_entropy(logits, batch[1]), logits, taught)

    def predict_step(self, batch, batch_idx=0):
        return self.net(batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def llama(
    form: str = "masked_lora",
    dtype: str = "float32",
    weight: float | None = None,
    optimizer: str = "adamw",
    **adapter: Any,
):
    """A Llama with adapters of a form, and its dense version as teacher with a weight."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).to(getattr(torch, dtype))
    return _module(base, form, weight, optimizer, **adapter)


def gpt2(dtype: str = "float32", **adapter: Any):
    """A GPT-2, which stores its matrices transposed and ties its head to its embedding."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **GPT2_SIZES, **NO_DROPOUT))
    return _module(base.to(getattr(torch, dtype)), train_norms=True, train_biases=True, **adapter)


def _module(base, form="masked_lora", weight=None, optimizer="adamw", **adapter):
    torch.manual_seed(1)
    settings = AdapterSettings(form, **({"r": 2, "dropout": 0.0, "target_modules": "all-linear"} | adapter))
    distill = None if weight is None else DistillSettings(weight)
    return CausalLMModule(base, settings, distill, learning_rate=0.01, weight_decay=0.1, optimizer=optimizer)


class Watched(Callback):
    """Counts errors at each step: gradients and values of pruned weights, and whole parameters of a sharded model
    between its passes."""

    def __init__(self) -> None:
        self.gradients = self.weights = self.whole = 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients += self._outside_masks(trainer, module, lambda parameter: parameter.grad)

    def on_train_batch_end(self, trainer, module, *args):
        self.weights += self._outside_masks(trainer, module, lambda parameter: parameter)
        self.whole += sum(not hasattr(parameter, "full_tensor") for parameter in module.parameters())

    @staticmethod
    def _outside_masks(trainer, module, of):
        masks = next(callback.masks for callback in trainer.callbacks if isinstance(callback, WandaPruning))
        pruned = {name: parameter for name, parameter in module.named_parameters() if of(parameter) is not None}
        named = {canonical_name(name): whole(of(parameter)) for name, parameter in pruned.items()}
        kept = {name: masks.for_parameter(name, named[name]) for name in masks.parameters if name in named}
        return sum(int(named[name].masked_fill(mask, 0).count_nonzero()) for name, mask in kept.items())


class Writes(PrunedRunCallback):
    """A data module whose text the dense model writes."""

    def on_pruning_check(self, trainer, module):
        with writing(module):
            pass


class Drifts(Callback):
    """Adds a value to pruned weights before a step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            weight = next(p for n, p in module.named_parameters() if n.endswith("layers.0.mlp.down_proj.weight"))
            shard_of(weight).add_(0.01)


class Spoils(Callback):
    """Sets a gradient to infinity on rank 1."""

    def on_after_backward(self, trainer, module):
        if trainer.global_rank == 1:
            next(p.grad for p in module.parameters() if p.grad is not None).to_local().fill_(torch.inf)


def run(ranks: int, folder: Path, module: LightningModule, *more: Callback, **settings: Any) -> dict[str, Any]:
    """Fit on a number of ranks, of which this process is one, and return the results."""
    pruning, report, watched = WandaPruning(), RunReport(str(folder)), Watched()
    callbacks = [GPUHourBudget(1.0), report, pruning, watched, *more]
    common = {"max_steps": 4, "gradient_clip_val": 0.01, "use_distributed_sampler": False}
    trainer = Trainer(callbacks=callbacks, **(QUIET | common | (sharded(ranks) if ranks > 1 else {}) | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Labelled() if isinstance(module, Own) else Windows())
    return {
        "weights": whole_weights(module),
        "digest": pruning.masks.digest(),
        "report": report.report,
        "step": trainer.global_step,
        "watched": {"gradients": watched.gradients, "weights": watched.weights, "whole": watched.whole},
    }
