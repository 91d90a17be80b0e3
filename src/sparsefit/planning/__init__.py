"""What a run will take, told before it begins: pure arithmetic on what miniature runs measured."""

from sparsefit.planning.gpus import GPUS, Shape, estimated, gpu_called
from sparsefit.planning.prediction import Measured, Plan, Stage, Work, predict

__all__ = ["GPUS", "Measured", "Plan", "Shape", "Stage", "Work", "estimated", "gpu_called", "predict"]
