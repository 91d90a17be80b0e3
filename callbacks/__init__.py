"""The Lightning face of sparsefit: callbacks that wire the engine into a trainer."""

from sparsefit.callbacks.budget import GPUHourBudget
from sparsefit.callbacks.pruning import WandaPruning
from sparsefit.callbacks.reconstruction import BlockwiseReconstruction
from sparsefit.callbacks.run_report import RunReport

__all__ = ["BlockwiseReconstruction", "GPUHourBudget", "RunReport", "WandaPruning"]
