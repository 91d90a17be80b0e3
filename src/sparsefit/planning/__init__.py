"""What a run will take, told before it begins: pure arithmetic on what miniature runs measured."""

from sparsefit.planning.prediction import Measured, Plan, Stage, Work, predict

__all__ = ["Measured", "Plan", "Stage", "Work", "predict"]
