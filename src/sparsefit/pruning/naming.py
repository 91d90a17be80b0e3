"""The names of modules and weights in the bare model, without what PEFT and torch.compile wrapped around it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

REGEX = "re:"
"""What a pattern that is a regular expression begins with."""

_WRAPPERS = re.compile(
    r"(?<![^.])(?:base_model\.model\.|_orig_mod\.)|(?<=\.)(?:base_layer|original_module|token_adapter)\."
)


def canonical_name(name: str) -> str:
    """A parameter's or layer's name without the parts that PEFT and torch.compile put into it.

    >>> canonical_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    return _WRAPPERS.sub("", name + ".").removesuffix(".")


def layer_name(weight_name: str) -> str:
    """The name by which a configuration speaks of a weight: without ".weight" and without an expert's number.

    >>> layer_name("0.fc.weight"), layer_name("0.experts.down_proj[3]")
    ('0.fc', '0.experts.down_proj')
    """
    return re.sub(r"\[\d+\]$", "", weight_name).removesuffix(".weight")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's name fits one of the patterns.

    Args:
        name: The layer's name.
        patterns: Each is one or more consecutive parts of a name, so that it means a layer ("q_proj", "mlp.down_proj")
            as well as everything in a module ("vision_tower", "layers.0"); or a glob ("*.experts.*", "layers.[0-3].*");
            or, after "re:", a regular expression that is searched for in the name.

    >>> matches("model.layers.0.q_proj", ["q_proj"]), matches("model.layers.0.q_proj", ["proj"])
    (True, False)
    >>> [matches("model.vision.layers.0.fc1", [pattern]) for pattern in ("vision", "layers.*.fc?", r"re:\.fc\d$")]
    [True, True, True]
    """
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith(REGEX):
        return re.search(pattern.removeprefix(REGEX), name) is not None
    if set(pattern) & set("*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return f".{pattern}." in f".{name}."


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the bare model by canonical name: what adapters added is left out.

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
    """Ids of the modules of which PEFT trains a copy (modules_to_save), which takes their place in the model.

    >>> copied_modules(nn.Linear(3, 5))
    set()
    """
    wrappers = (module for module in model.modules() if isinstance(getattr(module, "original_module", None), nn.Module))
    return {id(module) for wrapper in wrappers for module in wrapper.original_module.modules()}


def _wrapped_by(module: nn.Module) -> nn.Module | None:
    """The layer that a PEFT layer adapts (base_layer) or keeps a trained copy of (original_module)."""
    candidates = (getattr(module, name, None) for name in ("base_layer", "original_module"))
    return next((base for base in candidates if isinstance(base, nn.Module)), None)
