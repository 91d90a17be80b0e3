"""The prunable matrices of a model, each seen as one (out, in) matrix, and what is left dense and why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsefit.errors import ConfigError
from sparsefit.pruning.config import Pattern, PruningConfig

HEAD_NAMES = frozenset({"lm_head", "head", "classifier", "score", "embed_out", "output_projection", "qa_outputs"})

_WRAPPERS = re.compile(r"(?<![^.])(?:base_model\.model\.|_orig_mod\.)|(?<=\.)(?:base_layer|original_module)\.")


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One weight matrix and the layers that use it.

    Attributes:
        name: Name of the parameter in the bare model: wrappers (PEFT, torch.compile) leave no trace in it.
        parameter: The parameter itself.
        layers: Every layer that multiplies its input by this parameter (more than one where it is shared).
        transposed: Whether the parameter is stored (in, out), as GPT-2's Conv1D does.
    """

    name: str
    parameter: nn.Parameter
    layers: tuple[nn.Module, ...]
    transposed: bool = False

    def matrix(self) -> Tensor:
        """The weights as an (out, in) view that shares memory with the parameter."""
        weight = self.parameter.detach()
        return weight.t() if self.transposed else weight

    def remove(self, mask: Tensor) -> None:
        """Set the weights outside an (out, in) mask to zero, in place."""
        self.matrix().masked_fill_(~mask.to(self.parameter.device), 0)

    def restore(self, mask: Tensor, values: Tensor) -> None:
        """Put back the values that `remove` took, to the bit."""
        self.matrix()[~mask.to(self.parameter.device)] = values


def canonical_name(name: str) -> str:
    """A parameter's or layer's name without the parts that PEFT and torch.compile put into it.

    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" is
    "model.layers.0.self_attn.q_proj.weight".
    """
    return _WRAPPERS.sub("", name + ".").removesuffix(".")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a layer that this package can prune: nn.Linear, or the Conv1D of GPT-2."""
    weight = getattr(module, "weight", None)
    # A weight that a parametrization computes anew in each pass is no parameter: zeros written to it would be lost.
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
        return False
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    # transformers' Conv1D (GPT-2): y = x W + b with W (in, out). Known by its name, as this needs torch alone.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_weights(
    model: nn.Module, blocks: Iterable[nn.Module], config: PruningConfig
) -> tuple[list[PrunableWeight], dict[str, str]]:
    """The weights that a configuration prunes, in the order of the model, and those that stay dense.

    Args:
        model: Any module; adapters in it are never pruned, the layers they wrap are.
        blocks: Its repeated blocks; without targets only the layers inside them are pruned, or, if there are
            none, all but the output layer.
        config: Its `targets`, `exclude` and `pattern` are used.

    Returns:
        The prunable weights, and for each other matrix of the model its name and the reason.

    Raises:
        ConfigError: if nothing would be pruned, a target does not exist, N:M does not divide a width, or weights
            are NaN or infinite.
    """
    candidates = {name: module for name, module in base_modules(model).items() if is_linear(module)}
    _check_names_exist((*(config.targets or ()), *config.exclude), list(candidates))
    inside = {id(module) for block in blocks for module in block.modules()}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outputs = _output_layers(model)

    found: dict[int, tuple[str, list[nn.Module]]] = {}
    reasons: dict[int, str] = {}
    for name, layer in candidates.items():
        reason = _reason_to_keep(name, layer, config, inside, embedded, outputs)
        if reason:
            reasons[id(layer.weight)] = reason
            continue
        layers = found.setdefault(id(layer.weight), (f"{name}.weight", []))[1]
        if layer not in layers:  # one layer may stand under several names
            layers.append(layer)
    weights = [
        PrunableWeight(n, layers[0].weight, tuple(layers), _is_transposed(layers[0])) for n, layers in found.values()
    ]
    if not weights:
        raise ConfigError(
            f"{type(model).__name__} has no prunable weights: no linear layer is left to prune"
            + (f" after targets={config.targets}, exclude={config.exclude}" if config.targets or config.exclude else "")
        )
    _check_widths(weights, config.structure)
    _check_finite(weights)
    return weights, _left_dense(model, set(found), reasons)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the bare model by canonical name: what adapters added is left out."""
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


def _wrapped_by(module: nn.Module) -> nn.Module | None:
    """The layer that a PEFT layer adapts (base_layer) or keeps a trained copy of (original_module)."""
    candidates = (getattr(module, name, None) for name in ("base_layer", "original_module"))
    return next((base for base in candidates if isinstance(base, nn.Module)), None)


def _output_layers(model: nn.Module) -> set[int]:
    outputs = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in HEAD_NAMES:
            outputs |= {id(m) for m in module.modules()}
        if callable(getattr(module, "get_output_embeddings", None)):
            head = module.get_output_embeddings()
            outputs |= {id(head)} if head is not None else set()
    return outputs


def _reason_to_keep(
    name: str,
    layer: nn.Module,
    config: PruningConfig,
    inside: set[int],
    embedded: set[int],
    outputs: set[int],
) -> str | None:
    if matches(name, config.exclude):
        return "excluded by the configuration"
    if id(layer.weight) in embedded:
        return "shared with an embedding"
    if config.targets is not None:
        return None if matches(name, config.targets) else "not among the targets"
    if inside and id(layer) not in inside:
        return "outside the repeated blocks"
    if not inside and id(layer) in outputs:
        return "output layer"
    # It lends its weight to a fused function and is never called itself, so its input cannot be seen.
    if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        return "part of a fused nn.MultiheadAttention, which is not supported"
    return None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's name is one of the patterns or ends in one at a dot, as PEFT matches target modules."""
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _check_names_exist(patterns: Iterable[str], names: list[str]) -> None:
    known = sorted({name.split(".", i)[-1] for name in names for i in range(name.count(".") + 1)})
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            nearest = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"no linear layer is named '{pattern}'; "
                + (f"the nearest names are {', '.join(nearest)}" if nearest else f"the layers are {', '.join(kinds)}")
            )


def _check_widths(weights: list[PrunableWeight], pattern: Pattern | None) -> None:
    if pattern is None:
        return
    misfits = [f"{w.name} ({w.matrix().shape[1]} inputs)" for w in weights if w.matrix().shape[1] % pattern.m]
    if misfits:
        raise ConfigError(
            f"pattern '{pattern.n}:{pattern.m}' needs widths that {pattern.m} divides; it does not fit "
            f"{', '.join(misfits[:5])}{', ...' if len(misfits) > 5 else ''}: exclude them or take another pattern"
        )


def _check_finite(weights: list[PrunableWeight]) -> None:
    broken = [weight.name for weight in weights if not bool(weight.matrix().isfinite().all())]
    if broken:
        raise ConfigError(
            f"{', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''}: these weights are NaN or infinite, and such "
            "weights cannot be compared. The model was left as it was; load sound ones, or exclude the layers"
        )


def _left_dense(model: nn.Module, pruned: set[int], reasons: dict[int, str]) -> dict[str, str]:
    left = {}
    for module_name, module in base_modules(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in pruned:
                continue
            default = (
                "embedding" if isinstance(module, nn.Embedding) else f"not a linear layer: {type(module).__name__}"
            )
            if not parameter.is_floating_point():
                default = f"quantized: {type(module).__name__}"
            left[f"{module_name}.{name}".lstrip(".")] = reasons.get(id(parameter), default)
    return left


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
