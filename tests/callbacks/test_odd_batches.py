"""Batches whose rows are no samples: patches of images, and lists of one mapping for each image."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from small_runs import LanguageModel, fit
from torch import nn
from torch.utils.data import DataLoader

from sparsefit import collect_statistics, prune
from sparsefit.callbacks import WandaPruning
from sparsefit.pruning import PruningConfig


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.uniform_(0.5, 1.0, generator=generator)
    return model


def qwen() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    text = sizes | {"vocab_size": 70, "num_key_value_heads": 2, "rope_parameters": rope, "pad_token_id": 0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    special = {"image_token_id": 65, "vision_start_token_id": 66, "vision_end_token_id": 67, "video_token_id": 68}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    return randomized(Qwen2VLForConditionalGeneration(config))


def seen_by_qwen(samples: int = 12) -> list[dict[str, torch.Tensor]]:
    """Each with an image of 16 patches, four to a token, and padding for every other one."""
    random = torch.Generator().manual_seed(2)
    found = []
    for number in range(samples):
        ids = torch.randint(3, 60, (9,), generator=random)
        ids[1:7] = torch.tensor([66, 65, 65, 65, 65, 67])
        mask = torch.ones(9, dtype=torch.long)
        mask[8 - number % 2 * 1 :] = number % 2 == 0
        pixels = torch.randn(16, 96, generator=random)
        found.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "mm_token_type_ids": ids == 65})
    return found


def collated(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    texts = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0] if name != "pixel_values"}
    texts["mm_token_type_ids"] = texts["mm_token_type_ids"].int()
    pixels = torch.cat([sample["pixel_values"] for sample in samples])
    grids = torch.tensor([[1, 4, 4]] * len(samples))
    return {**texts, "pixel_values": pixels, "image_grid_thw": grids, "labels": texts["input_ids"]}


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "used"), [(12, 12), (6, 6), (8, 12), (None, 12)])
@pytest.mark.parametrize("update", ["block", "none"])
def test_patches_of_images_are_no_samples(asked, used, update):
    loader = DataLoader(seen_by_qwen(), batch_size=6, collate_fn=collated)
    pruning = WandaPruning(calibration=loader, calibration_samples=asked, update=update)
    module = LanguageModel(qwen())
    fit(module, loader, pruning, max_steps=1)
    assert pruning.summary["samples"] == used
    reported = [note for note in pruning.summary["notes"] if "were asked for" in note]
    assert bool(reported) == (asked not in (None, used))
    assert [note for note in pruning.summary["notes"] if note not in reported] == []
    expected = prune(qwen(), list(loader)[: used // 6], PruningConfig(update=update))
    assert all(torch.equal(pruning.masks[f"model.{name}"], mask) for name, mask in expected.masks.items())


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 5, 6, 7])
def test_training_on_patches_does_not_break_off_at_any_batch_size(batch_size):
    loader = DataLoader(seen_by_qwen(), batch_size=batch_size, collate_fn=collated)
    pruning = WandaPruning(calibration_samples=8)
    trainer = fit(LanguageModel(qwen()), loader, pruning, max_steps=1)
    assert trainer.global_step == 1
    assert pruning.summary["samples"] == min(12, -(-8 // batch_size) * batch_size)


class Detector(nn.Module):
    """Takes a list of images of any size, as torchvision's do, and in training their boxes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)) for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, images, targets=None):
        assert targets is None or len(images) == len(targets)
        losses = []
        for number, x in enumerate(images):
            x = self.stem(x[None])
            for block in self.blocks:
                x = x + block(x)
            box = self.head(x.mean((2, 3)))
            losses.append(box if targets is None else (box - targets[number]["boxes"]).abs().mean())
        return losses if targets is None else torch.stack(losses).sum()


class Detection(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Detector()

    def forward(self, images, targets=None):
        return self.model(images, targets)

    def training_step(self, batch, batch_idx):
        return self(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def detections(samples: int = 9):
    random = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    return [
        (
            torch.randn(3, 5 + number % 3, 6, generator=random) * scale,
            {"boxes": torch.rand(1 + number % 4, 4, generator=random), "labels": torch.ones(1 + number % 4)},
        )
        for number in range(samples)
    ]


def as_lists(samples):
    return tuple(zip(*samples, strict=True))


@pytest.mark.parametrize(("batch_size", "asked"), [(2, 5), (3, 7), (4, 9), (9, 2)])
def test_lists_of_one_mapping_for_each_image(batch_size, asked):
    loader = DataLoader(detections(), batch_size=batch_size, collate_fn=as_lists)
    pruning = WandaPruning(calibration=loader, calibration_samples=asked)
    trainer = fit(Detection(), loader, pruning, max_steps=1)
    assert trainer.global_step == 1
    assert pruning.summary["samples"] == asked
    expected = prune(Detector(), [as_lists([sample]) for sample in detections()[:asked]])
    assert all(torch.equal(pruning.masks[f"model.{name}"], mask) for name, mask in expected.masks.items())


def detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 5, "num_labels": 3}
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        **sizes,
        **heads,
    )
    return randomized(DetrForObjectDetection(config))


def test_a_mask_of_pixels_and_labels_of_each_image():
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 64, 64, dtype=torch.long)
    for number, (height, width) in enumerate([(64, 64), (64, 32), (32, 64), (16, 64)]):
        mask[number, :height, :width] = 1
    labels = [{"class_labels": torch.ones(n, dtype=torch.long), "boxes": torch.rand(n, 4)} for n in (1, 3, 2, 1)]
    config = PruningConfig(update="none")
    found = collect_statistics(detr(), [{"pixel_values": pixels, "pixel_mask": mask, "labels": labels}], [config])
    whole = collect_statistics(detr(), [{"pixel_values": pixels[:1]}], [config])
    assert found.samples == 4
    assert not found.notes
    tokens = {name: part.statistics.tokens for name, [part] in found.parts.items()}
    of_one = {name: part.statistics.tokens for name, [part] in whole.parts.items()}
    encoder = [name for name in tokens if ".encoder.layers." in name]
    assert encoder
    for name, count in tokens.items():
        sees_image = name in encoder or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        assert count == (2.25 if sees_image and "backbone" not in name else 4) * of_one[name], name
