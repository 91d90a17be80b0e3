"""Models that are no language models, pruned and recovered in a fit; what is written reloads through plain PEFT."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from small_runs import fit
from torch.utils.data import DataLoader

from sparsefit.callbacks import RunReport, WandaPruning
from sparsefit.modules import (
    EmbeddingModule,
    ImageClassifierModule,
    Seq2SeqModule,
    SequenceClassifierModule,
    TokenClassifierModule,
)
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.recovery.merge import merge

pytestmark = pytest.mark.slow

BERT = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "num_labels": 3,
}
T5 = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
WHISPER = {
    "vocab_size": 61,
    "d_model": 16,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 32))},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}

# module, class of transformers and its configuration, names of attention layers, name of the head, PEFT's task
KINDS = {
    "sequence": (SequenceClassifierModule, "BertForSequenceClassification", BERT, "query", "classifier", "SEQ_CLS"),
    "token": (TokenClassifierModule, "BertForTokenClassification", BERT, "query", "classifier", "TOKEN_CLS"),
    "t5": (Seq2SeqModule, "T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}, "q", None, "SEQ_2_SEQ_LM"),
    "whisper": (Seq2SeqModule, "WhisperForConditionalGeneration", WHISPER, "q_proj", None, None),
    "embedding": (EmbeddingModule, "BertModel", BERT, "query", None, "FEATURE_EXTRACTION"),
    "image": (ImageClassifierModule, "ViTForImageClassification", VIT, "q_proj", "classifier", None),
}


def model_of(kind):
    _, name, config, *_ = KINDS[kind]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config)).eval()


def batch_of(kind, size=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (size, 9), generator=random)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    text, tokens = {"input_ids": ids, "attention_mask": mask}, torch.randint(3, 61, (size, 5), generator=random)
    classes = torch.randint(3, (size,), generator=random)
    if kind == "sequence":
        return text | {"labels": classes}
    if kind == "token":
        return text | {"labels": (ids % 3).masked_fill(mask == 0, -100)}
    if kind == "t5":
        return text | {"labels": tokens}
    if kind == "whisper":
        return {"input_features": torch.randn(size, 8, 32, generator=random), "labels": tokens}
    if kind == "embedding":
        pairs = torch.stack([ids, ids.flip(0)], 1)
        return {
            "input_ids": pairs,
            "attention_mask": torch.ones_like(pairs),
            "labels": torch.rand(size, generator=random),
        }
    return {"pixel_values": torch.randn(size, 3, 8, 8, generator=random), "labels": classes}


class Data(LightningDataModule):
    def __init__(self, kind) -> None:
        super().__init__()
        self.kind = kind

    def loader(self, seed):
        batches = [batch_of(self.kind, seed=seed + n) for n in range(3)]
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self.loader(0)

    def test_dataloader(self):
        return self.loader(0)


@torch.no_grad()
def answer(kind, model):
    batch = batch_of(kind, seed=7)
    if kind == "embedding":
        batch = {name: value[:, 0] for name, value in batch.items() if name != "labels"}
    if kind == "image":
        batch = {"pixel_values": batch["pixel_values"]}
    output = model.eval()(**batch)
    return output.logits if kind != "embedding" else output.last_hidden_state


def report_of(run):
    return json.loads((run / "report.json").read_text())


def run_of(kind, folder, adapter=None, distill=None, **settings):
    module = KINDS[kind][0](model_of(kind), adapter=adapter, distill=distill, learning_rate=0.01)
    fit(module, Data(kind), WandaPruning(0.5, calibration_samples=8), RunReport(folder), max_epochs=6, **settings)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_reloads_through_plain_peft_without_a_difference(tmp_path, kind):
    _, name, _, layer, head, task = KINDS[kind]
    saved = (head,) if head else ()
    adapter = AdapterSettings(r=2, dropout=0.0, target_modules=[layer], modules_to_save=saved)
    module = run_of(kind, tmp_path / "run", adapter)
    base = getattr(transformers, name).from_pretrained(tmp_path / "run/base")
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    assert torch.equal(answer(kind, loaded), answer(kind, module.model))
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["task_type"] == task
    if head:
        trained = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
        new = next(tensor for n, tensor in trained.items() if n.endswith(f"{head}.weight"))
        assert not torch.equal(new, before[f"{head}.weight"])
    masks = MaskSet.load(tmp_path / "run/masks.safetensors")
    weights = load_file(tmp_path / "run/base/model.safetensors")
    zeros, size = (sum(f(weights[n]) for n in masks.parameters) for f in (lambda w: int((w == 0).sum()), torch.numel))
    assert zeros == size // 2
    assert not any(head and n.startswith(head) for n in masks)
    report = report_of(tmp_path / "run")
    assert report["sparsity"]["total"] == 0.5
    for metric in report["metrics"]:
        assert set(report[metric]) == {"dense", "pruned", "recovered"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["masked_lora", "hira", "full"])
def test_lossless_adapters_end_in_one_model(tmp_path, kind, form):
    _, name, _, layer, head, _ = KINDS[kind]
    saved = (head,) if head else ()
    adapter = AdapterSettings(form, r=2, dropout=0.0, target_modules=[layer], modules_to_save=saved)
    module = run_of(kind, tmp_path / "run", adapter, DistillSettings(0.5))
    merged = getattr(transformers, name).from_pretrained(tmp_path / "run/model")
    MaskSet.load(tmp_path / "run/masks.safetensors").verify(merged)
    torch.testing.assert_close(answer(kind, merged), answer(kind, module.model), rtol=1e-4, atol=1e-5)
    if head:
        base = load_file(tmp_path / "run/base/model.safetensors")
        assert not torch.equal(merged.get_parameter(f"{head}.weight"), base[f"{head}.weight"])
    masks = next(c for c in module.trainer.callbacks if isinstance(c, WandaPruning)).masks
    if form != "full":
        in_memory = merge(module.model, masks.renamed(lambda n: n.removeprefix("model.")))
        torch.testing.assert_close(answer(kind, in_memory), answer(kind, merged), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_dense_model_bit_for_bit(tmp_path, kind):
    expected, seen = answer(kind, model_of(kind)), []

    class Look(KINDS[kind][0]):
        def training_step(self, batch, batch_idx):
            seen.append(self.taught(answer, kind, self.model))
            return super().training_step(batch, batch_idx)

    module = Look(model_of(kind), distill=DistillSettings(0.5), learning_rate=0.01)
    fit(module, Data(kind), WandaPruning(0.5, calibration_samples=8), max_epochs=2)
    assert len(seen) == 6
    assert all(torch.equal(expected, found) for found in seen)
    assert not torch.equal(expected, answer(kind, module.model))
    assert float(module.trainer.callback_metrics["train_divergence"]) > 0


def test_whisper_writes_what_it_hears(tmp_path):
    module = Seq2SeqModule(model_of("whisper"), learning_rate=0.02, generated_tokens=5)

    class Numbers:
        pad_token_id = 0

        def batch_decode(self, ids, skip_special_tokens):
            return [" ".join(str(int(n)) for n in row if n > 2) for row in ids]

    module.tokenizer = Numbers()
    fit(module, Data("whisper"), WandaPruning(0.5, calibration_samples=8), RunReport(tmp_path / "run"), max_epochs=75)
    report = report_of(tmp_path / "run")
    assert report["metrics"]["word_error_rate"] == "lower"
    assert report["perplexity"]["recovered"] < 1.5 < report["perplexity"]["pruned"]
    assert report["word_error_rate"]["recovered"] < report["word_error_rate"]["pruned"]


def test_the_feature_extractor_of_whisper_is_saved_with_it(tmp_path):
    model_of("whisper").save_pretrained(tmp_path / "model")
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path / "model")
    module = Seq2SeqModule(str(tmp_path / "model"))
    fit(module, Data("whisper"), WandaPruning(0.5, calibration_samples=8), RunReport(tmp_path / "run"), max_epochs=1)
    for folder in ("base", "model"):
        assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "run" / folder).feature_size == 8
    assert module.tokenizer is None
