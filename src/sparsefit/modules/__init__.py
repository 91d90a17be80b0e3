"""LightningModules, and the models that they load."""

from sparsefit.modules.causal_lm import CausalLMModule
from sparsefit.modules.image_classifier import ImageClassifierModule
from sparsefit.modules.recovery_mixin import RecoveryMixin
from sparsefit.modules.text_classifier import SequenceClassifierModule, TokenClassifierModule

__all__ = [
    "CausalLMModule",
    "ImageClassifierModule",
    "RecoveryMixin",
    "SequenceClassifierModule",
    "TokenClassifierModule",
]
