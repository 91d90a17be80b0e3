"""A T5 that writes: encoder and decoder pruned 2:4, the kept weights trained on with the dense model as their teacher.

`Seq2SeqModule` trains encoder-decoders of transformers (T5, Whisper), `LabelledTextDataModule` reads texts and what is
to be written for them. With `generated_tokens` the model writes whenever it is measured, and wrong words are counted.
In calibration the decoder reads the labels, so that its layers, too, see what they will see.

Prints the report's summary with the perplexity, the token accuracy and the word error rate dense, pruned and recovered;
then what the recovered model, loaded from its folder, writes. Takes about 15 seconds.
"""

import json
import random
import tempfile
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration, T5Tokenizer

from sparsefit import DistillSettings, RunReport, WandaPruning
from sparsefit.data import LabelledTextDataModule
from sparsefit.modules import Seq2SeqModule

GERMAN = ["eins", "zwei", "drei", "vier", "rot", "blau"]
ENGLISH = ["one", "two", "three", "four", "red", "blue"]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def pair():
    """Some words and their translation."""
    chosen = random.choices(range(6), k=3)
    return {"text": " ".join(GERMAN[n] for n in chosen), "label": " ".join(ENGLISH[n] for n in chosen)}


seed_everything(0)
folder = Path(tempfile.mkdtemp())

# A small model in a folder, and rows of texts in files: in their place stand your own, or names on the hub.
words = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in GERMAN + ENGLISH)]
tokenizer = T5Tokenizer(vocab=[(word, 0.0) for word in words], extra_ids=0)
sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **sizes))
tokenizer.save_pretrained(folder / "t5")
for part, count in (("train", 400), ("test", 40)):
    (folder / f"{part}.jsonl").write_text("\n".join(json.dumps(pair()) for _ in range(count)))
sources = {"train_source": str(folder / "train.jsonl"), "test_source": str(folder / "test.jsonl")}
data = LabelledTextDataModule(str(folder / "t5"), "seq2seq", **sources, batch_size=32)
Trainer(max_epochs=20, **QUIET).fit(Seq2SeqModule(t5, learning_rate=5e-3), data)
t5.save_pretrained(folder / "t5")

# Of every four weights two stay. They learn from the words and from the dense model.
module = Seq2SeqModule(str(folder / "t5"), distill=DistillSettings(0.5), generated_tokens=4, learning_rate=2e-3)
callbacks = [WandaPruning(pattern="2:4"), RunReport(str(folder / "run"))]
Trainer(max_epochs=5, callbacks=callbacks, **QUIET).fit(module, data)

recovered = AutoModelForSeq2SeqLM.from_pretrained(folder / "run/model")
written = recovered.generate(**tokenizer("drei vier blau", return_tensors="pt"), max_new_tokens=4)
print("drei vier blau ->", tokenizer.decode(written[0], skip_special_tokens=True))
