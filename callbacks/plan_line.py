"""The line that opens a fit: what is known of it before anything is run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from sparsefit.callbacks.trainer_lookup import budget_of
from sparsefit.errors import ConfigError
from sparsefit.planning import opening
from sparsefit.pruning import PruningConfig
from sparsefit.pruning.targets import count_weights


def tell_opening(trainer: Trainer, module: LightningModule, config: PruningConfig) -> None:
    """Log the line; where there is nothing to prune by what is known so far, pruning itself says so, or finds more."""
    with suppress(ConfigError):
        rank_zero_info(opening_line(trainer, module, config))


def opening_line(trainer: Trainer, module: LightningModule, config: PruningConfig) -> str:
    """The line that `sparsefit plan` opens with, too: nothing is measured for it, and no weight is read.

    Args:
        trainer: In a fit.
        module: Dense or pruned, on its device.
        config: Of the pruning.

    Raises:
        ConfigError: if there is nothing to prune.
    """
    budget, pruned = budget_of(trainer), count_weights(module, config)
    parameters = {id(p): p for p in module.parameters()}
    trained = [p for p in parameters.values() if p.requires_grad]
    counts = {"all": _count(parameters.values()), "pruned": pruned, "train": _count(trained)}
    # Optimizers are there before the callbacks' turn, and their moments only after the first step.
    moments = sum(_moments(group, optimizer) for optimizer in trainer.optimizers for group in optimizer.param_groups)
    held = sum(map(local_bytes, parameters.values())) + sum(map(local_bytes, trained)) + moments + pruned / 8
    steps = trainer.max_steps if trainer.max_steps >= 0 else None
    return opening(counts, held, None if budget is None else budget.gpu_hours, trainer.world_size, steps)


def local_bytes(tensor: Tensor) -> int:
    """Bytes that this process holds of a tensor, which may be split over several."""
    local = getattr(tensor, "to_local", lambda: tensor)()
    return local.numel() * local.element_size()


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _moments(group: dict[str, Any], optimizer: Optimizer) -> int:
    """Bytes of as many numbers for each weight as Adam and its kin keep, or SGD with a momentum."""
    kept = 2 if "betas" in optimizer.defaults else bool(group.get("momentum"))
    return kept * sum(map(local_bytes, group["params"]))
