"""Writes a pruned model without its adapters, so that `from_pretrained` alone can read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsefit.bare_model import base_modules, canonical_name
from sparsefit.pruning import MaskSet
from sparsefit.recovery.finite_checks import check_finite_weights

WEIGHTS_FILE = "model.safetensors"


def pretrained_part(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The name and the outermost part of a module that can save itself in Hugging Face layout, or None.

    For a PEFT-wrapped model this is the wrapped model, under its canonical name, as in a `MaskSet`.
    """
    for name, part in module.named_modules():
        if callable(getattr(part, "save_pretrained", None)) and hasattr(part, "config"):
            base = part.get_base_model() if hasattr(part, "peft_config") else part
            return canonical_name(name), base
    return None


def adapted_part(module: nn.Module) -> nn.Module | None:
    """The PEFT model inside a module, or None."""
    return next((part for part in module.modules() if hasattr(part, "peft_config")), None)


def trains_base(module: nn.Module) -> bool:
    """Whether any parameter outside the adapters requires a gradient, except biases that PEFT saves with them."""
    adapted = adapted_part(module)
    configs = adapted.peft_config.values() if adapted is not None else ()
    with_biases = any(getattr(config, "bias", "none") != "none" for config in configs)
    return any(
        parameter.requires_grad
        for part in base_modules(module).values()
        for name, parameter in part.named_parameters(recurse=False)
        if not (with_biases and name == "bias")
    )


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the bare model, under its own names, without adapters and their wrappers."""
    owners = set(base_modules(model))
    state = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    # The scales of a quantized weight are named after the weight: "layer.weight.absmax".
    return {name: t for name, t in state.items() if {name.rpartition(".")[0], name.partition(".weight.")[0]} & owners}


def export_base(module: nn.Module, masks: MaskSet, folder: Path) -> MaskSet:
    """Write the weights of a module without its adapters.

    If a part of the module is a transformers model, that part is written in Hugging Face layout; otherwise the state
    dict of the module is written as one safetensors file.

    Args:
        module: A pruned LightningModule or model.
        masks: Its masks.
        folder: Where to write; created if missing.

    Returns:
        The masks under the names that the written tensors have.

    Raises:
        MaskError: if a pruned weight is not zero, before anything is written.
        DivergenceError: if a weight is NaN or infinite.
    """
    masks.verify(module)
    return write_model(module, masks, folder, base_state_dict)


def write_model(
    module: nn.Module, masks: MaskSet, folder: Path, state_of: Callable[[nn.Module], dict[str, Tensor]]
) -> MaskSet:
    """Write the state dict that `state_of` returns for a module's model, as `export_base` does; returns its masks."""
    check_finite_weights(module)
    folder.mkdir(parents=True, exist_ok=True)
    found = pretrained_part(module)
    if found is None:
        state = {name: tensor.detach().contiguous().clone() for name, tensor in state_of(module).items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        return masks
    _, model = found
    exported = exported_masks(module, masks)
    state = state_of(model)
    if not _has_stacks(masks):
        model.save_pretrained(folder, state_dict=state)
    # Stacked experts, and the layers of ViT, DeiT and Swin, are saved with the names and shapes of the masks rather
    # than those of the architecture's original checkpoint; `from_pretrained` reads both.
    if _has_stacks(masks) or not exported.parameters.keys() <= _saved_names(folder):
        model.save_pretrained(folder, state_dict=state, save_original_format=False)
    for name in ("tokenizer", "image_processor", "feature_extractor"):
        processor = getattr(module, name, None)
        if callable(getattr(processor, "save_pretrained", None)):
            processor.save_pretrained(folder)
    return exported


def _has_stacks(masks: MaskSet) -> bool:
    return any(parameter not in masks for parameter in masks.parameters)


def _saved_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def exported_masks(module: nn.Module, masks: MaskSet) -> MaskSet:
    """The masks of a module under the names that its weights have where `export_base` writes them."""
    found = pretrained_part(module)
    prefix = f"{found[0]}." if found is not None and found[0] else ""
    bare = _bare_names(module)

    def name_in_file(weight: str) -> str:
        parameter, bracket, expert = weight.partition("[")
        return f"{bare.get(parameter, parameter)}{bracket}{expert}".removeprefix(prefix)

    return masks.renamed(name_in_file)


def _bare_names(module: nn.Module) -> dict[str, str]:
    """Names in a PEFT model -> names in its base, for weights whose name `canonical_name` cannot derive: with prompts
    and prefixes the base is a sibling of the adapter, not wrapped by it."""
    for path, part in module.named_modules():
        if not callable(getattr(part, "get_base_model", None)):
            continue
        outer = f"{canonical_name(path)}." if path else ""
        own = {id(weight): canonical_name(name) for name, weight in part.get_base_model().named_parameters()}
        within = [
            (canonical_name(f"{path}.{name}".lstrip(".")), id(weight)) for name, weight in part.named_parameters()
        ]
        return {name: f"{outer}{own[key]}" for name, key in within if key in own}
    return {}
