"""Predicts time, memory and disk space of a run before it starts, from measurements of miniature runs."""

from sparsefit.planning.gpus import GPUS, Shape, estimated, gpu_called
from sparsefit.planning.plan_data import Measured, Plan, Stage, Work
from sparsefit.planning.plan_text import pace_line, plan_line, plan_summary
from sparsefit.planning.prediction import predict
from sparsefit.planning.resource_limits import Room, blocks_within, unfit

__all__ = ["GPUS", "Measured", "Plan", "Room", "Shape", "Stage", "Work", "estimated", "gpu_called", "pace_line"]
__all__ += ["blocks_within", "plan_line", "plan_summary", "predict", "unfit"]
