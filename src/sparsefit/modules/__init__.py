"""LightningModules, and the models that they load."""

from sparsefit.modules.causal_lm import CausalLMModule

__all__ = ["CausalLMModule"]
