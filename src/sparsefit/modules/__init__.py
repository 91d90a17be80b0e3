"""LightningModules, and loading of the models that they train."""

from sparsefit.modules.causal_lm import CausalLMModule
from sparsefit.modules.embedding import EmbeddingModule
from sparsefit.modules.image_classifier import ImageClassifierModule
from sparsefit.modules.recovery_mixin import RecoveryMixin
from sparsefit.modules.seq2seq import Seq2SeqModule
from sparsefit.modules.sharding import shard
from sparsefit.modules.text_classifier import SequenceClassifierModule, TokenClassifierModule

__all__ = [
    "CausalLMModule",
    "EmbeddingModule",
    "ImageClassifierModule",
    "RecoveryMixin",
    "Seq2SeqModule",
    "SequenceClassifierModule",
    "TokenClassifierModule",
    "shard",
]
