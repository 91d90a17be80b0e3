"""Merges adapters into the sparse base without filling pruned weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsefit.bare_model import canonical_name
from sparsefit.errors import MaskError, MergeError
from sparsefit.pruning import MaskSet
from sparsefit.pruning.masks import pack_bits
from sparsefit.quantized import is_quantized
from sparsefit.recovery.export import adapted_part, base_state_dict
from sparsefit.recovery.finite_checks import nonfinite_count
from sparsefit.recovery.gather_shards import has_shards, whole
from sparsefit.recovery.tuner_trials import fills_zeros
from sparsefit.sharded import reshard, shard_of


def lossy_layers(model: nn.Module, masks: MaskSet) -> list[str]:
    """Names of the pruned weights whose zeros merging would fill, or whose adapters cannot be merged."""
    from peft.tuners.hira.layer import HiraLayer

    lossy, kinds = [], set()
    for name, layer in _adapted_layers(model):
        if (
            name not in masks.parameters
            or isinstance(layer, HiraLayer)
            or getattr(layer, "mask_bits", None) is not None
        ):
            continue
        if type(layer) in kinds or _fills_zeros(layer):
            lossy.append(name)
            kinds.add(type(layer))  # one layer of a type decides for all
    return lossy


def merge(model: nn.Module, masks: MaskSet, reapply_masks: bool = False) -> nn.Module:
    """Merge a model's adapters into its weights permanently.

    Args:
        model: A PEFT model, masked adapters bound to their masks; other models are returned unchanged.
        masks: The masks, by the names of `model`.
        reapply_masks: Also merge adapters that fill pruned weights, and set these to zero again. The result differs
            from the model that was trained.

    Returns:
        The bare model, whose pruned weights are exactly zero.

    Raises:
        MergeError: if merging would fill pruned weights without `reapply_masks`, or the base is quantized; nothing has
            changed then.
        MaskError: if the masks do not fit the model, or a pruned weight is not zero; nothing has changed then.
    """
    masks.verify(model)
    lossy = check_mergeable(model, masks, reapply_masks)
    if not hasattr(model, "peft_config"):
        return model
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        raise MergeError(f"{_form(model)} adapters cannot be merged, says PEFT: {error}") from error
    if lossy:
        masks.apply(merged)
    masks.verify(merged)
    return merged


@contextmanager
def merged_in_place(module: nn.Module, masks: MaskSet) -> Iterator[None]:
    """Merge a model's adapters temporarily; afterwards it is bitwise as before, with its adapters separate.

    Args:
        module: A LightningModule or model whose pruned weights are zero. Copies of the adapted weights are kept in CPU
            memory.
        masks: The masks, by the names of `module`.

    Raises:
        MergeError: as `merge`.
    """
    check_mergeable(module, masks)
    adapted = adapted_part(module)
    if adapted is None:
        yield
        return
    reshard(module)
    layers = [layer for _, layer in _adapted_layers(module)]
    # All parameters of a layer, as IA3 also scales biases; by name, as PEFT replaces those of torch's attention.
    before = [
        (base, {name: shard_of(weight).to("cpu", copy=True) for name, weight in base.named_parameters()})
        for base in (layer.get_base_layer() for layer in layers)
    ]
    try:
        with torch.no_grad():
            _merge_adapter(adapted, layers)
        masks.verify(module)
        yield
    finally:
        with torch.no_grad():
            for layer in layers:
                if layer.merged:
                    with whole(layer):
                        layer.unmerge()
            for base, kept in before:
                for name, weight in base.named_parameters():
                    shard_of(weight).copy_(kept[name])


def _fills_zeros(layer: nn.Module) -> bool:
    with whole(layer):
        return fills_zeros(layer)


def _merge_adapter(adapted: nn.Module, layers: list[nn.Module]) -> None:
    try:
        if not has_shards(adapted):
            adapted.merge_adapter(safe_merge=True)
            return
        for layer in layers:
            with whole(layer):
                layer.merge(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        raise MergeError(f"{_form(adapted)} adapters cannot be merged, says PEFT: {error}") from error


def _form(adapted: nn.Module) -> str:
    return " and ".join(sorted({config.peft_type.value for config in adapted.peft_config.values()}))


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with merged adapters, under the bare model's names. Modules of which PEFT trains a copy
    have the values of the copy."""
    from peft.utils import ModulesToSaveWrapper

    state = base_state_dict(model)
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            trained = wrapper.modules_to_save[wrapper.active_adapters[0]]
            for name, tensor in trained.state_dict().items():
                whole = canonical_name(f"{path}.{name}")
                state[whole] = tensor.to(state[whole].dtype)
    return state


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers with adapters, and the canonical names of their weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            # For stacked experts, PEFT's layer names the parameter that it adapts.
            yield canonical_name(f"{name}.{getattr(layer, 'parameter_name', 'weight')}"), layer


def check_mergeable(model: nn.Module, masks: MaskSet, reapply_masks: bool = False) -> list[str]:
    """Check that a model can be merged, without changing it.

    Returns:
        The weights on which the masks must be applied again.

    Raises:
        MergeError: as `merge`.
        MaskError: if an adapter was bound to other masks.
    """
    quantized = [name for name, layer in _adapted_layers(model) if is_quantized(layer.get_base_layer())]
    if quantized:
        raise MergeError(
            f"the base is quantized ({quantized[0]}, ...): adapters merge into floats only. Put the floats back first "
            "(sparsefit.recovery.quantize.dequantize_base); `sparsefit merge RUN` does so by itself"
        )
    _check_adapters(model, masks)
    lossy = lossy_layers(model, masks)
    if lossy and not reapply_masks:
        raise MergeError(
            f"merging would fill pruned weights of {len(lossy)} matrices ({lossy[0]}, ...): their adapters, of the "
            f"kind {_form(adapted_part(model))}, do not keep zeros, as W + s B A does not. Keep the adapter apart, "
            "train form masked_lora or hira, which merge without a loss, or ask for the masks to be applied again "
            "(--reapply-masks), which makes another, worse model"
        )
    return lossy


def _check_adapters(model: nn.Module, masks: MaskSet) -> None:
    for name, layer in _adapted_layers(model):
        own = [
            tensor
            for path, tensor in layer.named_parameters()
            if path.startswith(tuple(getattr(layer, "adapter_layer_names", ())))
        ]
        if any(nonfinite_count(tensor) for tensor in own):
            raise MergeError(
                f"the adapter of {name} holds values that are NaN or infinite: its training has diverged. Take an "
                "earlier checkpoint, or train with a lower learning rate"
            )
        bits = getattr(layer, "mask_bits", None)
        if bits is not None and name in masks and not torch.equal(bits.cpu(), pack_bits(masks[name])):
            raise MaskError(
                f"the adapter of {name} keeps to another mask than the one given: merge it with the masks that it was "
                "trained with, or bind these masks first (bind_masks), which makes another model"
            )
