"""Averages of weights that other callbacks keep, such as Lightning's WeightAveraging."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch.optim.swa_utils import AveragedModel


def restart_averages(trainer: Trainer, module: LightningModule) -> None:
    """Let averages that have not begun start from the module as it is now.

    They were copied from it when the fit was set up, dense, and would bring these weights back wherever an average is
    evaluated, saved or put in the module's place before it has begun.
    """
    for callback in trainer.callbacks:
        for value in vars(callback).values():
            if isinstance(value, AveragedModel) and not value.n_averaged:
                value.module.load_state_dict(module.state_dict())
