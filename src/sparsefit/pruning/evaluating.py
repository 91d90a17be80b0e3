"""The state of a model in which its blocks can be watched and run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsefit.pruning.layers.experts import eager_experts
from sparsefit.pruning.layers.quantized import plain_layout


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing on the way that would hide a layer's input or compute with weights of before:
    no key-value caches, no fused attention, no compiled blocks, no autocast copies of weights. All as it was
    afterwards, module by module.

    >>> with evaluating(model := nn.Dropout()): print(model.training)
    False
    """
    training = [module for module in model.modules() if module.training]
    configs = (getattr(module, "config", None) for module in model.modules())
    caching = [config for config in configs if getattr(config, "use_cache", False) is True]
    fused, copies = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_autocast_cache_enabled(False)
        model.eval()
        for config in caching:
            config.use_cache = False
        with torch.compiler.set_stance("force_eager"), eager_experts(model), plain_layout(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.set_autocast_cache_enabled(copies)
        for config in caching:
            config.use_cache = True
        for module in training:
            module.training = True
