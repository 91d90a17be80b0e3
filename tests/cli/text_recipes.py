"""Small text models of several kinds, their tokenizer, training rows, and recipes."""

from __future__ import annotations

import json
import random

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, T5Config

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards read"
WORDS = (*TEXT.split(), "good", "bad", "fine", "poor")
GOOD, BAD = ("good", "fine"), ("bad", "poor")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
}


def tokenizer():
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def save_model(folder, name, with_tokenizer=True, **settings):
    """Save a random model in a folder."""
    torch.manual_seed(0)
    words = tokenizer()
    if name.startswith("T5"):
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        config = T5Config(vocab_size=len(words), **sizes | settings)
    else:
        config = BertConfig(vocab_size=len(words), pad_token_id=0, **SIZES | settings)
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder)
    if with_tokenizer:
        words.save_pretrained(folder)
    return model.eval()


def rows(task, count=48, seed=0):
    """Rows whose label can be learned."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words = draw.choices(WORDS[:12], k=draw.randint(3, 8))
        good = draw.random() < 0.5
        words[draw.randrange(len(words))] = draw.choice(GOOD if good else BAD)
        if task == "sequence_classification":
            found.append({"text": " ".join(words), "label": "good" if good else "bad"})
        elif task == "token_classification":
            marks = ["good" if word in GOOD else "bad" if word in BAD else "other" for word in words]
            found.append({"text": words, "label": marks})
        elif task == "seq2seq":
            found.append({"text": " ".join(words), "label": "good dog" if good else "bad"})
        else:
            same = draw.random() < 0.5
            other = words if same else draw.choices(WORDS[:12], k=4)
            found.append({"text": " ".join(words), "other": " ".join(other), "label": 5.0 if same else 0.0})
    return found


def write_rows(folder, task):
    for part, seed, count in (("train", 0, 48), ("val", 1, 16), ("test", 2, 16)):
        lines = [json.dumps(row) for row in rows(task, count, seed)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


def text_recipe(folder, model, task, module, data=None, **settings):
    """A recipe for a model folder. Writes its training rows."""
    write_rows(folder, task)
    sources = {f"{part}_source": str(folder / f"{part}.jsonl") for part in ("train", "val", "test")}
    return {
        "model": {
            "class_path": f"sparsefit.modules.{module}",
            "init_args": {"model": str(model), "learning_rate": 0.01, **settings},
        },
        "data": {
            "class_path": "sparsefit.data.LabelledTextDataModule",
            "init_args": {
                "tokenizer": str(model),
                "task": task,
                "batch_size": 8,
                "max_length": 16,
                "calibration_samples": 16,
                **sources,
                **(data or {}),
            },
        },
        "pruning": {"sparsity": 0.5},
        "budget": {"gpu_hours": 1.0},
        "run": {"folder": str(folder / "run")},
        "trainer": {"accelerator": "cpu", "max_steps": 12, "log_every_n_steps": 1, "enable_progress_bar": False},
    }
