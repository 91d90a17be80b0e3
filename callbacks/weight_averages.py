"""Weight averages kept by other callbacks, such as Lightning's WeightAveraging."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch.optim.swa_utils import AveragedModel


def restart_averages(trainer: Trainer, module: LightningModule) -> None:
    """Restart averages without any update so far from the module's current weights.

    They were copied when the fit was set up, from the dense module. Without a restart these dense weights would come
    back wherever the average is evaluated, saved or loaded into the module before its first update.
    """
    for callback in trainer.callbacks:
        for value in vars(callback).values():
            if isinstance(value, AveragedModel) and not value.n_averaged:
                value.module.load_state_dict(module.state_dict())
