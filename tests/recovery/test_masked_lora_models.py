"""Masked layers: what waits for the backward pass, and whole models."""

from __future__ import annotations

import pytest
import torch
from masked_layers import IDS, masked_layer, matrix, random_adapters, update
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsefit import PruningConfig, prune
from sparsefit.bare_model import canonical_name
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter, bind_masks

# Memory.


def bytes_saved_for_backward(function, owned):
    """Bytes that wait for the backward pass in storages other than the given tensors', and the largest of them."""
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}
    alive = []  # so that no address is used twice

    def pack(tensor):
        alive.append(tensor)
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values()), max(kept.values(), default=0)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "dropout"),
    [
        (torch.float32, False, 0.0),
        (torch.float32, False, 0.1),
        (torch.float32, True, 0.0),
        (torch.bfloat16, False, 0.0),
        (torch.bfloat16, False, 0.1),
    ],
)
def test_no_matrix_of_the_layer_waits_for_the_backward_pass(kind, dtype, autocast, dropout):
    width, tokens = (192, 160), 4
    model, layer, mask = masked_layer(kind, dropout=dropout, dtype=dtype, width=width)
    x = torch.randn(tokens, width[0], dtype=dtype, requires_grad=True)
    owned = [*model.parameters(), x]

    def run(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return function(x)

    total, largest = bytes_saved_for_backward(lambda: run(layer), owned)
    entries = width[0] * width[1]
    if autocast and dropout:  # the base layer's own copy of its weight
        entries *= 2
    # The inputs, what dropout leaves of them, and one bit a weight.
    assert largest <= max(entries / 8, tokens * width[0] * 4) < entries
    assert total <= entries / 8 + 4 * tokens * width[0] * 4
    naive, _ = bytes_saved_for_backward(
        lambda: run(lambda x: F.linear(x.float(), matrix(layer) + update(layer, mask))), owned
    )
    assert naive >= 4 * entries > 4 * total


# Whole models.


def reference_loss(model, masks, ids):
    """The loss of the bare model with each adapted weight in its dense form, by autograd."""
    weights = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            path = f"{name}.base_layer.weight"
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            delta = delta * layer.scaling["default"]
            delta = delta * masks[canonical_name(path)]
            stored = delta.T if isinstance(layer.base_layer, Conv1D) else delta
            weights[path] = layer.base_layer.weight + stored
    with model.disable_adapter():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return functional_call(model.get_base_model(), weights, kwargs={"input_ids": ids, "labels": ids}).loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),
        ("opt", ("q_proj", "fc2")),
        ("mixtral", "all-linear"),
        ("t5", ("q", "v", "wo")),
    ],
)
def test_a_model_has_the_loss_and_gradients_of_its_dense_form(tiny_model, architecture, targets):
    settings = AdapterSettings("masked_lora", r=3, dropout=0.0, target_modules=targets)
    model = random_adapters(attach_adapter(tiny_model(architecture), settings), 0.1)
    batch = {"input_ids": IDS, "labels": IDS} if architecture == "t5" else {"input_ids": IDS}
    masks = prune(model, [batch], PruningConfig(sparsity=0.6)).masks
    bind_masks(model, masks)
    gradients = []
    for loss in (model(input_ids=IDS, labels=IDS).loss, reference_loss(model, masks, IDS)):
        trained = [p for name, p in model.named_parameters() if "lora_" in name]
        gradients.append((loss.detach(), torch.autograd.grad(loss, trained)))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0][1])


def test_a_model_with_layers_of_both_layouts(tiny_model):
    model = tiny_model("gpt2", tie_word_embeddings=False)
    settings = AdapterSettings("masked_lora", r=3, dropout=0.0, target_modules=("c_attn", "lm_head"))
    model = random_adapters(attach_adapter(model, settings), 0.1)
    masks = prune(model, [{"input_ids": IDS}], PruningConfig(targets=("c_attn", "lm_head"))).masks
    assert "lm_head.weight" in masks
    bind_masks(model, masks)
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, reference_loss(model, masks, IDS))
