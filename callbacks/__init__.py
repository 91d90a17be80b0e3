"""The Lightning callbacks of sparsefit, which connect the pruning engine to a trainer."""

from sparsefit.callbacks.budget import GPUHourBudget
from sparsefit.callbacks.checkpoint_io import AtomicCheckpointIO
from sparsefit.callbacks.checkpoints import SparseCheckpoints
from sparsefit.callbacks.dense_control import DenseControl
from sparsefit.callbacks.hooks import PrunedRunCallback
from sparsefit.callbacks.pruning import WandaPruning
from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.callbacks.reconstruction import BlockwiseReconstruction
from sparsefit.callbacks.run_report import RunReport

__all__ = [
    "AtomicCheckpointIO",
    "BlockwiseReconstruction",
    "DenseControl",
    "GPUHourBudget",
    "PrunedRunCallback",
    "QuantizedBase",
    "RunReport",
    "SparseCheckpoints",
    "WandaPruning",
]
