"""Pruning studies: a grid of scores, granularities and sparsities over a model, calibrated once."""

from sparsefit.study.grid import Grid, Point
from sparsefit.study.results import Results
from sparsefit.study.run import Subject, study

__all__ = ["Grid", "Point", "Results", "Subject", "study"]
