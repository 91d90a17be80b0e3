"""A BERT-style classifier of texts: pruned, recovered by masked LoRA, and merged into one exactly sparse model.

`LabelledTextDataModule` reads rows of texts and labels, `SequenceClassifierModule` trains any classifier that
`from_pretrained` can load. Masked LoRA is W + s M (.) (B A): what it adds is masked like the weights, so it merges
without bringing one of them back.

Prints the report's summary: accuracy dense, pruned, recovered and merged, and the sparsity of every layer; then the
zeros of the merged model as transformers loads it. Takes about 15 seconds.
"""

import json
import random
import tempfile
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertTokenizer

from sparsefit import AdapterSettings, MaskSet, RunReport, WandaPruning
from sparsefit.data import LabelledTextDataModule
from sparsefit.modules import SequenceClassifierModule

THINGS, GOOD, BAD = ["film", "book", "meal", "song"], ["good", "fine", "great"], ["bad", "poor", "dull"]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def review():
    """Two opinions and the class of the second, which is the one that counts."""
    classes = [random.random() < 0.5 for _ in range(2)]
    clauses = [f"the {random.choice(THINGS)} is {random.choice(GOOD if good else BAD)}" for good in classes]
    return {"text": " but ".join(clauses), "label": "positive" if classes[1] else "negative"}


seed_everything(0)
folder = Path(tempfile.mkdtemp())

# A small model in a folder, and rows of texts in files: in their place stand your own, or names on the hub.
vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *THINGS, *GOOD, *BAD, "the", "is", "but"]
tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
tokenizer.save_pretrained(folder / "bert")
for part, count in (("train", 400), ("test", 200)):
    (folder / f"{part}.jsonl").write_text("\n".join(json.dumps(review()) for _ in range(count)))
sources = {"train_source": str(folder / "train.jsonl"), "test_source": str(folder / "test.jsonl")}
data = LabelledTextDataModule(str(folder / "bert"), "sequence_classification", **sources, batch_size=32)
bert = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes))
dense = SequenceClassifierModule(bert, learning_rate=1e-3)
Trainer(max_epochs=8, **QUIET).fit(dense, data)
dense.model.save_pretrained(folder / "bert")

# Pruned as the fit starts; then only the adapters and the head are trained.
adapter = AdapterSettings("masked_lora", target_modules="all-linear")
module = SequenceClassifierModule(str(folder / "bert"), adapter, learning_rate=3e-3)
callbacks = [WandaPruning(0.75), RunReport(str(folder / "run"))]
Trainer(max_epochs=4, callbacks=callbacks, **QUIET).fit(module, data)

# The recovered model is one of transformers: nothing of sparsefit is needed to load it, but to check it.
merged = AutoModelForSequenceClassification.from_pretrained(folder / "run/model")
masks = MaskSet.load(folder / "run/masks.safetensors")
masks.verify(merged)  # raises where a pruned weight is not zero
weights = [merged.get_parameter(name) for name in masks]
zeros, all_weights = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
print(f"the merged model on disk: {zeros / all_weights:.2%} zeros in {len(masks)} layers")
