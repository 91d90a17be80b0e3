"""A BERT-style text classifier: pruned, recovered with masked LoRA, and merged into one sparse model.

`LabelledTextDataModule` reads texts and labels. `SequenceClassifierModule` trains any classifier that `from_pretrained`
can load. Masked LoRA is W + s M (.) (B A): its update is masked like the weights, so merging keeps all zeros.

Prints the report's summary with the accuracy of the dense, the pruned, the recovered and the merged model, and the
sparsity of each layer; then the zeros of the merged model after transformers has loaded it. Takes about 15 seconds.
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
    """Two opinions; the label is the class of the second one."""
    classes = [random.random() < 0.5 for _ in range(2)]
    clauses = [f"the {random.choice(THINGS)} is {random.choice(GOOD if good else BAD)}" for good in classes]
    return {"text": " but ".join(clauses), "label": "positive" if classes[1] else "negative"}


seed_everything(0)
folder = Path(tempfile.mkdtemp())

# A small model in a folder, and texts in files. Use your own, or names on the hub, instead.
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

# The model is pruned at the start of the fit; then only the adapters and the head are trained.
adapter = AdapterSettings("masked_lora", target_modules="all-linear")
module = SequenceClassifierModule(str(folder / "bert"), adapter, learning_rate=3e-3)
callbacks = [WandaPruning(0.75), RunReport(str(folder / "run"))]
Trainer(max_epochs=4, callbacks=callbacks, **QUIET).fit(module, data)

# Transformers alone can load the recovered model. sparsefit is needed here only to check its zeros.
merged = AutoModelForSequenceClassification.from_pretrained(folder / "run/model")
masks = MaskSet.load(folder / "run/masks.safetensors")
masks.verify(merged)  # raises an error if a pruned weight is not zero
weights = [merged.get_parameter(name) for name in masks]
zeros, all_weights = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
print(f"the merged model on disk: {zeros / all_weights:.2%} zeros in {len(masks)} layers")
