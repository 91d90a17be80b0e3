"""Adapters on disk: PEFT's own files, and a JSON file with the form and the digest of the masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from sparsefit.errors import MaskError, RunFolderError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapters import bind_masks, masked_layer_types
from sparsefit.recovery.export import adapted_part, exported_masks
from sparsefit.recovery.finite_checks import check_finite_weights
from sparsefit.recovery.inspection import files_digest
from sparsefit.recovery.tuners import saved_as_initialized

NOTES_FILE = "sparsefit.json"


def form_of(module: nn.Module) -> str | None:
    """The form of the adapters in a model, such as "lora", "masked_lora" or "hira"; None if there are none."""
    model = adapted_part(module)
    if model is None:
        return None
    if any(callable(getattr(layer, "take_mask", None)) for layer in model.modules()):
        return "masked_lora"
    return next(iter(model.peft_config.values())).peft_type.value.lower()


def export_adapter(
    module: nn.Module, masks: MaskSet, base: Path, folder: Path, notes: dict[str, Any] | None = None
) -> bool:
    """Write the adapter of a PEFT-wrapped model, with `base` as its base model.

    Args:
        module: A LightningModule or model.
        masks: Its masks.
        base: The folder of the sparse base.
        folder: Where to write; created if missing.
        notes: Plain values to save with the form, the base's name and the digest of the masks.

    Returns:
        Whether there was an adapter to write.

    Raises:
        DivergenceError: if a weight is NaN or infinite, before anything is written.
    """
    model = adapted_part(module)
    if model is None:
        return False
    check_finite_weights(model, "the adapter")
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base.resolve())
    with saved_as_initialized(model):
        model.save_pretrained(folder)
    digest = exported_masks(module, masks).digest()
    written = files_digest(base) if base.is_dir() else None
    known = {"form": form_of(module), "base": base.name, "base_digest": written, "masks": digest, **(notes or {})}
    (folder / NOTES_FILE).write_text(json.dumps(known, indent=2), encoding="utf-8")
    return True


def read_notes(folder: Path) -> dict[str, Any]:
    """The JSON values that `export_adapter` saved with an adapter.

    Raises:
        RunFolderError: if there is no adapter, or sparsefit did not write it.
    """
    if not (folder / "adapter_config.json").is_file():
        raise RunFolderError(f"there is no adapter in {folder}: it holds no adapter_config.json")
    try:
        return json.loads((folder / NOTES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{folder / NOTES_FILE} cannot be read, so the form of the adapter is not known: {error}. An adapter of "
            "plain PEFT is loaded by PeftModel.from_pretrained"
        ) from error


def load_adapter(model: nn.Module, folder: Path, masks: MaskSet) -> nn.Module:
    """Load a saved adapter onto its sparse base; masked adapters get their masks.

    Args:
        model: The base, as `from_pretrained` returns it.
        folder: What `export_adapter` wrote.
        masks: The masks of the base.

    Returns:
        The PEFT model.

    Raises:
        MaskError: if the adapter was trained with other masks, or the base does not hold them.
        RunFolderError: if it cannot be read, or does not fit the base.
    """
    from peft import PeftConfig, PeftModel

    notes = read_notes(folder)
    if notes["masks"] != masks.digest():
        raise MaskError(
            f"the adapter in {folder} was trained on another base: its masks are not the ones given. Use the base and "
            "the masks of the run that it is from"
        )
    masks.verify(model)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if notes["form"] == "masked_lora":
            config._register_custom_module(masked_layer_types())
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunFolderError(f"the adapter in {folder} does not fit its base or is damaged: {error}") from error
    bind_masks(adapted, masks)
    return adapted.eval()
