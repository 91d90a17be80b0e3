"""The optimizers of the modules, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsefit.errors import ConfigError
from sparsefit.extras import need
from sparsefit.settings import number
from sparsefit.sharded import is_sharded

_LEAST_IN_8_BITS = 4096  # AdamW8bit keeps moments in 8 bits for tensors of at least this many weights


def check_settings(name: str, choices: tuple[str, ...], learning_rate: float, weight_decay: float) -> None:
    """Check the settings of an optimizer.

    Raises:
        ConfigError: for a rate or a weight decay out of range, a name that is not among the choices, or "adamw_8bit"
            without bitsandbytes.
    """
    number("learning_rate", learning_rate, above=0)
    number("weight_decay", weight_decay, least=0)
    if name not in choices:
        raise ConfigError(
            f"unknown optimizer {name!r}: the choices are {', '.join(choices[:-1])} and {choices[-1]}",
        )
    if name == "adamw_8bit":
        need("bitsandbytes", "the optimizer adamw_8bit")


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient.

    Raises:
        ConfigError: if no parameter does.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("no parameter requires a gradient: give `adapter` settings, or unfreeze the model")
    return trained


def matrices_decay(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups in which vectors (norms, biases, layer scales) have no weight decay; no group is empty."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.ndim > 1, []).append(parameter)
    return [{"params": group, "weight_decay": weight_decay * is_matrix} for is_matrix, group in groups.items()]


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.0,
) -> Optimizer:
    """Build the optimizer "adamw", "sgd" (with momentum) or "adamw_8bit" (of bitsandbytes).

    Args:
        name: a name that `check_settings` accepted.
        parameters: parameters or parameter groups, as for torch's optimizers.
        learning_rate: the learning rate of all groups.
        weight_decay: the weight decay of groups without their own.
        momentum: the momentum of SGD.

    Raises:
        ConfigError: if this release of bitsandbytes has no 8-bit optimizer for the parameters' device, or they are
            sharded over devices.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    from bitsandbytes.optim import AdamW8bit

    parameters = [*parameters]
    given = [own for entry in parameters for own in (entry["params"] if isinstance(entry, dict) else [entry])]
    if any(map(is_sharded, given)):
        raise ConfigError("adamw_8bit cannot step weights that are split over devices: take the optimizer adamw")
    optimizer = AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    on_cpu = any(parameter.device.type == "cpu" for group in optimizer.param_groups for parameter in group["params"])
    if on_cpu and not _steps_on_cpu(AdamW8bit):
        raise ConfigError(
            "this release of bitsandbytes has no 8-bit optimizer for the CPU: upgrade it (pip install -U "
            "bitsandbytes), train on a GPU, or take the optimizer adamw"
        )
    return optimizer


def _steps_on_cpu(optimizer: type[Optimizer]) -> bool:
    """Whether an 8-bit optimizer can step a CPU tensor that is large enough for 8-bit moments."""
    probe = nn.Parameter(torch.zeros(_LEAST_IN_8_BITS))
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer([probe]).step()
    except (NotImplementedError, RuntimeError):  # no kernel, or none for this device
        return False
    return True
