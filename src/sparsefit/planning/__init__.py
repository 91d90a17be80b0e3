"""What a run will take, told before it begins: pure arithmetic on what miniature runs measured."""

from sparsefit.planning.gpus import GPUS, Shape, estimated, gpu_called
from sparsefit.planning.plan_data import Measured, Plan, Stage, Work
from sparsefit.planning.plan_text import opening, pace, told
from sparsefit.planning.prediction import predict
from sparsefit.planning.resource_limits import Room, unfit

__all__ = ["GPUS", "Measured", "Plan", "Room", "Shape", "Stage", "Work", "estimated", "gpu_called", "opening", "pace"]
__all__ += ["predict", "told", "unfit"]
