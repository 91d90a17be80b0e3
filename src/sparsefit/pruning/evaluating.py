"""The state of a model in which its blocks can be watched and run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from sparsefit.pruning.layers.experts import eager_experts
from sparsefit.quantized import plain_layout


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing that would hide a layer's input or compute with weights of before: no key-value
    caches, fused attention, compiled blocks or autocast copies of weights. All as it was afterwards.

    >>> with evaluating(model := nn.Dropout()): print(model.training)
    False
    """
    fused = torch.backends.mha
    with ExitStack() as stack:
        for module in model.modules():
            if module.training:
                stack.callback(setattr, module, "training", True)
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", False) is True:
                stack.callback(setattr, config, "use_cache", True)
                config.use_cache = False
        stack.callback(fused.set_fastpath_enabled, fused.get_fastpath_enabled())
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        fused.set_fastpath_enabled(False)
        torch.set_autocast_cache_enabled(False)
        model.eval()
        with torch.compiler.set_stance("force_eager"), eager_experts(model), plain_layout(model):
            yield
