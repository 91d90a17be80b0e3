"""Regression tests of models and data that were once pruned wrongly."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
)

from sparsefit import PruningConfig, WandaPruning, prune

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_a_resnet_of_which_only_the_classifier_is_pruned_says_how_little_that_is():
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10)
    )
    images = {"pixel_values": torch.randn(4, 3, 32, 32)}
    result = prune(model, [images], PruningConfig(0.6, targets=["classifier"]))
    share = 320 / sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert result.masks.sparsity == pytest.approx(0.6, abs=0.01)
    assert result.coverage == pytest.approx(share)
    assert result.overall_sparsity == pytest.approx(result.masks.sparsity * share)
    assert any(f"only {share:.1%} of the weights" in note for note in result.notes)


def test_a_vision_tower_stays_dense_in_a_run_on_text_alone():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16)
    text = LlamaConfig(**SIZES, vocab_size=61, num_key_value_heads=2)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    ).eval()
    result = prune(model, [{"input_ids": torch.randint(1, 60, (4, 9))}])
    assert result.update == "block"
    assert all("language_model.layers" in name for name in result.masks)
    unreached = {n for n, reason in result.left_dense.items() if reason == "not reached by the calibration data"}
    assert any("vision_tower" in name for name in unreached)
    assert not any("language_model" in name for name in unreached)


class BertClassifier(LightningModule):
    """Batches are (input_ids, attention_mask, labels)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=61, num_labels=2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, labels=labels)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self(*batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def padded_texts() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 33, (16,), generator=generator)
    mask = (torch.arange(32) < lengths[:, None]).long()
    return DataLoader(TensorDataset(torch.randint(1, 61, (16, 32), generator=generator), mask, mask[:, 3]), 4)


def test_padding_of_a_tensor_dataset_counts_for_nothing():
    loader, pruning = padded_texts(), WandaPruning(0.5)
    Trainer(max_steps=1, callbacks=[pruning], accelerator="cpu", **QUIET).fit(BertClassifier(), loader)
    real = int(loader.dataset.tensors[1].sum())
    assert real < 16 * 32
    assert pruning.result.tokens == real
    assert pruning.result.samples == 16


@pytest.mark.parametrize("zeros", ["keep", "adopt"])
def test_no_zero_of_a_sparse_model_comes_back_in_a_fit(zeros):
    module, loader = BertClassifier(), padded_texts()
    prune(module.model, None, PruningConfig(0.7, score="magnitude"))
    before = {name: p == 0 for name, p in module.named_parameters() if ".layer." in name and p.ndim > 1}
    pruning = WandaPruning(0.7, existing_zeros=zeros)
    Trainer(max_steps=4, callbacks=[pruning], accelerator="cpu", **QUIET).fit(module, loader)
    assert set(pruning.masks) == set(before)
    assert pruning.masks.sparsity == pytest.approx(0.7, abs=1e-3)
    for name, was_zero in before.items():
        assert (module.get_parameter(name)[was_zero] == 0).all(), name
