"""Merging what was trained into the sparse base, without bringing a pruned weight back."""

from __future__ import annotations

import torch
from torch import nn

from sparsefit.errors import MergeError
from sparsefit.pruning import MaskSet
from sparsefit.pruning.naming import canonical_name


def lossy_layers(model: nn.Module, masks: MaskSet) -> list[str]:
    """The pruned weights that merging a model's adapters would fill again, by name."""
    from peft.tuners.hira.layer import HiraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = []
    for name, layer in model.named_modules():
        weight = canonical_name(f"{name}.weight")
        if isinstance(layer, BaseTunerLayer) and weight in masks.parameters:
            keeps_zeros = isinstance(layer, HiraLayer) or getattr(layer, "mask_bits", None) is not None
            if not keeps_zeros:
                found.append(weight)
    return found


@torch.no_grad()
def merge(model: nn.Module, masks: MaskSet, reapply_masks: bool = False) -> nn.Module:
    """Merge a model's adapters into its weights, in place.

    Args:
        model: A PEFT model, masked adapters bound to their masks; any other model has nothing to merge.
        masks: The masks, by the names of `model`.
        reapply_masks: Merge adapters that do not keep to the masks, too, and set what they bring back to zero: another
            model than the one that was trained.

    Returns:
        The bare model, whose pruned weights are exactly zero.

    Raises:
        MergeError: if merging would bring pruned weights back and the masks shall not be applied again; nothing has
            changed then.
        MaskError: if a pruned weight is not zero.
    """
    lossy = lossy_layers(model, masks) if hasattr(model, "peft_config") else []
    if lossy and not reapply_masks:
        raise MergeError(
            f"merging would fill pruned weights of {len(lossy)} matrices ({lossy[0]}, ...): their adapters are plain "
            "LoRA, W + s B A. Keep the adapter apart, train form masked_lora or hira, which merge without a loss, or "
            "ask for the masks to be applied again (--reapply-masks), which makes another, worse model"
        )
    if not hasattr(model, "peft_config"):
        masks.verify(model)
        return model
    merged = model.merge_and_unload(safe_merge=True)
    if lossy:
        masks.apply(merged)
    masks.verify(merged)
    return merged
