"""What a model is worth: perplexity."""

from sparsefit.evaluation.perplexity import perplexity

__all__ = ["perplexity"]
