"""The line logged at the start of a fit: weights, memory, budget and steps, known before anything runs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from sparsefit.callbacks.trainer_lookup import budget_of
from sparsefit.errors import ConfigError
from sparsefit.planning import plan_line
from sparsefit.pruning import PruningConfig
from sparsefit.pruning.targets import count_weights


def log_plan_line(trainer: Trainer, module: LightningModule, config: PruningConfig) -> None:
    """Log the line. Logs nothing if no weights to prune are found: pruning itself then finds them or raises."""
    with suppress(ConfigError):
        rank_zero_info(plan_line_of(trainer, module, config))


def plan_line_of(trainer: Trainer, module: LightningModule, config: PruningConfig) -> str:
    """The first line of a fit, which `sparsefit plan` prints, too. Nothing is measured for it, and no weight is read.

    Args:
        trainer: A trainer in a fit.
        module: The module, dense or pruned, on its device.
        config: The pruning configuration.

    Raises:
        ConfigError: if there is nothing to prune.
    """
    budget, pruned = budget_of(trainer), count_weights(module, config)
    parameters = {id(p): p for p in module.parameters()}
    trains = 0 not in (trainer.max_steps, trainer.max_epochs)
    trained = [p for p in parameters.values() if p.requires_grad and trains]
    counts = {"all": _count(parameters.values()), "pruned": pruned, "train": _count(trained)}
    # Optimizers exist before callbacks are called, but have their moments only after the first step.
    optimizers = trainer.optimizers if trains else []
    moments = sum(_moments(group, optimizer) for optimizer in optimizers for group in optimizer.param_groups)
    held = sum(map(local_bytes, parameters.values())) + sum(map(local_bytes, trained)) + moments + pruned / 8
    steps = (trainer.max_steps if trainer.max_steps >= 0 else None) if trains else 0
    return plan_line(counts, held, None if budget is None else budget.gpu_hours, trainer.world_size, steps)


def local_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of this rank's shard of it."""
    local = getattr(tensor, "to_local", lambda: tensor)()
    return local.numel() * local.element_size()


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _moments(group: dict[str, Any], optimizer: Optimizer) -> int:
    """Bytes of optimizer state for a group: two values a weight for Adam-like optimizers, one for SGD with momentum."""
    kept = 2 if "betas" in optimizer.defaults else bool(group.get("momentum"))
    return kept * sum(map(local_bytes, group["params"]))
