"""LightningModules, and the models that they load."""

from sparsefit.modules.causal_lm import CausalLMModule
from sparsefit.modules.image_classifier import ImageClassifierModule

__all__ = ["CausalLMModule", "ImageClassifierModule"]
