"""The bare model: modules and names without the wrappers of PEFT and torch.compile."""

from __future__ import annotations

import re

from torch import nn

_WRAPPERS = re.compile(
    r"(?<![^.])(?:base_model\.model\.|_orig_mod\.)|(?<=\.)(?:base_layer|original_module|token_adapter)\."
)


def canonical_name(name: str) -> str:
    """The name of a parameter or layer without the parts that PEFT and torch.compile add to it.

    >>> canonical_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    return _WRAPPERS.sub("", name + ".").removesuffix(".")


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the bare model by canonical name, without modules that adapters added.

    >>> base_modules(nn.Sequential(nn.ReLU()))["0"]
    ReLU()
    """
    wrapped = {id(module): base for module in model.modules() if (base := _wrapped_by(module)) is not None}
    adapters: set[int] = set()
    for module in model.modules():
        if id(module) in wrapped:
            inner = {id(m) for m in wrapped[id(module)].modules()}
            adapters |= {id(m) for m in module.modules() if m is not module} - inner
    return {
        canonical_name(name): module
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) not in adapters and id(module) not in wrapped
    }


def copied_modules(model: nn.Module) -> set[int]:
    """Ids of the modules that PEFT replaces by a trained copy (modules_to_save).

    >>> copied_modules(nn.Linear(3, 5))
    set()
    """
    wrappers = (module for module in model.modules() if isinstance(getattr(module, "original_module", None), nn.Module))
    return {id(module) for wrapper in wrappers for module in wrapper.original_module.modules()}


def _wrapped_by(module: nn.Module) -> nn.Module | None:
    """The layer that a PEFT layer adapts (base_layer) or keeps a trained copy of (original_module)."""
    candidates = (getattr(module, name, None) for name in ("base_layer", "original_module"))
    return next((base for base in candidates if isinstance(base, nn.Module)), None)
