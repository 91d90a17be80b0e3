"""Prune a network at fit start with Wanda, keep its masks fixed, recover it inside a GPU-hour budget."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsefit.pruning import (
    DenseStatistics,
    MaskSet,
    PruningConfig,
    PruningResult,
    collect_statistics,
    prune,
    prune_from_statistics,
    register_score,
)
from sparsefit.pruning.targets import CHECKS
from sparsefit.recovery.tuners import check_tuners

CHECKS.append(check_tuners)

if TYPE_CHECKING:
    from sparsefit.callbacks import (
        BlockwiseReconstruction,
        DenseControl,
        GPUHourBudget,
        QuantizedBase,
        RunReport,
        SparseCheckpoints,
        WandaPruning,
    )
    from sparsefit.hub import push_to_hub
    from sparsefit.recovery.adapters import AdapterSettings, attach_adapter
    from sparsefit.recovery.distill import DistillSettings

# What needs Lightning, transformers or PEFT is imported on first access, as the engine needs only torch.
_ON_DEMAND = {
    "AdapterSettings": "sparsefit.recovery.adapters",
    "BlockwiseReconstruction": "sparsefit.callbacks",
    "DenseControl": "sparsefit.callbacks",
    "DistillSettings": "sparsefit.recovery.distill",
    "GPUHourBudget": "sparsefit.callbacks",
    "QuantizedBase": "sparsefit.callbacks",
    "RunReport": "sparsefit.callbacks",
    "SparseCheckpoints": "sparsefit.callbacks",
    "WandaPruning": "sparsefit.callbacks",
    "attach_adapter": "sparsefit.recovery.adapters",
    "push_to_hub": "sparsefit.hub",
}

__all__ = [
    "AdapterSettings",
    "BlockwiseReconstruction",
    "DenseControl",
    "DenseStatistics",
    "DistillSettings",
    "GPUHourBudget",
    "MaskSet",
    "PruningConfig",
    "PruningResult",
    "QuantizedBase",
    "RunReport",
    "SparseCheckpoints",
    "WandaPruning",
    "attach_adapter",
    "collect_statistics",
    "prune",
    "prune_from_statistics",
    "push_to_hub",
    "register_score",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'sparsefit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_DEMAND[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
