"""Evaluation: perplexity and zero-shot tasks of language models, accuracy of image classifiers."""

from sparsefit.evaluation.accuracy import accuracy
from sparsefit.evaluation.perplexity import perplexity
from sparsefit.evaluation.zero_shot import load_tasks, zero_shot

__all__ = ["accuracy", "load_tasks", "perplexity", "zero_shot"]
