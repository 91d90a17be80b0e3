"""What a model is worth: perplexity of language models, accuracy of image classifiers."""

from sparsefit.evaluation.accuracy import accuracy
from sparsefit.evaluation.perplexity import perplexity

__all__ = ["accuracy", "perplexity"]
