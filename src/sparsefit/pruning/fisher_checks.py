"""Whether a model can be pruned with allocation "fisher", found out before calibration data go through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsefit.calibration.batches import Forward, MicroBatch
from sparsefit.errors import ConfigError
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.fisher import check_gradients, requiring_gradients
from sparsefit.pruning.predictions import logits_of
from sparsefit.pruning.targets import reached_weights
from sparsefit.pruning.tracing import trace
from sparsefit.ranks import errors_on_all_ranks


def check_whole_weights(config: PruningConfig, sharded: bool = False, mapped: bool = False) -> None:
    """Check that the weights of a model are where an allocation by gradients can be computed.

    Args:
        config: The settings of the pruning; with another allocation than "fisher" all is well.
        sharded: Whether the model is sharded over ranks.
        mapped: Whether its weights are read from memory-mapped files.

    Raises:
        ConfigError: if they are not; says where they are.

    >>> check_whole_weights(PruningConfig(allocation="fisher")), check_whole_weights(PruningConfig(), sharded=True)
    (None, None)
    """
    if config.allocation == "fisher" and (sharded or mapped):
        where = "sharded over ranks" if sharded else "read from memory-mapped files"
        raise ConfigError(f"allocation 'fisher' needs gradients, and the model is {where}: use allocation 'owl'")


def check_sample(model: nn.Module, config: PruningConfig, sample: Any, forward: Forward) -> None:
    """With allocation "fisher", run one sample to check that the model returns logits, with a gradient, and that no
    weight that the sample reaches is quantized. The model must be in the state of `evaluating`, without gradients.

    Args:
        model: The model.
        config: The settings of the pruning.
        sample: A batch of one calibration sample.
        forward: Runs the model on a batch.

    Raises:
        ConfigError: if that is not so; on all ranks if it is not on one.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    >>> with torch.no_grad(): check_sample(model, PruningConfig(allocation="fisher"), torch.ones(1, 2), model)
    """
    if config.allocation != "fisher":
        return
    weights = reached_weights(model, config, trace(model, [MicroBatch(sample, origin=(0,))], forward))
    check_gradients(model, weights)
    with errors_on_all_ranks(), torch.enable_grad(), requiring_gradients({w.parameter for w in weights}):
        logits_of(forward(sample), sample=sample)
