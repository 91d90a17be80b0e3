"""Models that are not made of linear layers of floats: what is saved has the zeros, and loads again."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.quantized import dequantized
from sparsefit.recovery.export import export_base
from sparsefit.recovery.inspection import inspect_folder

IDS = torch.arange(3, 51).view(4, 12)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}


@pytest.fixture(params=["Mixtral", "GptOss"])
def experts(request):
    config = getattr(transformers, f"{request.param}Config")(**SIZES)
    torch.manual_seed(0)
    return getattr(transformers, f"{request.param}ForCausalLM")(config).eval()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_stacked_experts_are_saved_with_their_zeros(experts, tmp_path, pattern):
    result = prune(experts, [{"input_ids": IDS}], PruningConfig(pattern=pattern))
    stacks = [name for name in result.masks.parameters if name.endswith("experts.down_proj")]
    assert len(stacks) == 2
    saved = export_base(experts, result.masks, tmp_path / "base")
    saved.save(tmp_path / "masks.safetensors")

    tensors = load_file(tmp_path / "base/model.safetensors")
    saved.verify(tensors)
    for name in stacks:
        assert torch.equal(tensors[name], experts.get_parameter(name))
        assert (tensors[name] == 0).float().mean() == 0.5

    inspection = inspect_folder(tmp_path)
    assert not inspection.broken
    assert inspection.sparsity == pytest.approx(result.masks.sparsity)
    loaded = type(experts).from_pretrained(tmp_path / "base")
    MaskSet.load(tmp_path / "masks.safetensors").verify(loaded)
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in experts.named_parameters())


def test_an_expert_brought_back_is_reported(experts, tmp_path):
    masks = prune(experts, [{"input_ids": IDS}]).masks
    export_base(experts, masks, tmp_path / "base").save(tmp_path / "masks.safetensors")
    with torch.no_grad():
        experts.model.layers[1].mlp.experts.gate_up_proj[2].fill_(1)
    experts.save_pretrained(tmp_path / "base", save_original_format=False)
    assert list(inspect_folder(tmp_path).broken) == ["model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("reconstruction", [None, "sequential"])
def test_quantized_weights_are_saved_with_their_zeros(tiny_model, tmp_path, bits, reconstruction):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    quantized = transformers.BitsAndBytesConfig(**settings)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "dense", quantization_config=quantized, device_map="cpu")
    config = PruningConfig(reconstruction=reconstruction)
    masks = prune(model, [{"input_ids": IDS}], config).masks
    assert len(masks) == 14
    masks.verify(model)
    export_base(model, masks, tmp_path / "base").save(tmp_path / "masks.safetensors")

    inspection = inspect_folder(tmp_path)
    assert not inspection.broken
    assert inspection.sparsity >= 0.5  # some weights were zero before
    masks.verify(load_file(tmp_path / "base/model.safetensors"))
    loaded = load(tmp_path / "base", device_map="cpu")
    masks.verify(loaded)
    for name in masks:
        layer = name.removesuffix(".weight")
        assert torch.equal(dequantized(loaded.get_submodule(layer)), dequantized(model.get_submodule(layer)))


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes)).eval()


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_layers_are_saved_under_the_names_that_their_masks_have(tmp_path, targets):
    """And not under those of the first checkpoint of their architecture: "attention.query" for "q_proj"."""
    model, pixels = vit(), torch.randn(4, 3, 8, 8)
    masks = prune(model, [{"pixel_values": pixels}], PruningConfig(update="none", targets=targets)).masks
    export_base(model, masks, tmp_path / "base").save(tmp_path / "masks.safetensors")
    inspection = inspect_folder(tmp_path)
    assert not inspection.broken
    assert inspection.sparsity == pytest.approx(masks.sparsity)
    assert masks.keys() <= load_file(tmp_path / "base/model.safetensors").keys()
    loaded = type(model).from_pretrained(tmp_path / "base").eval()
    masks.verify(loaded)
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_the_image_processor_goes_along(tmp_path):
    module = torch.nn.Module()
    module.model = vit()
    module.image_processor = transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]
    )
    export_base(module, MaskSet(), tmp_path)
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert again.to_dict() == module.image_processor.to_dict()
