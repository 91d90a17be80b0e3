"""A vision-language model in which only the language part is pruned: `targets=["language_model"]`.

A small LLaVA of transformers reads digits: its input is 16 patches of an image and a question token, and the next token
is the answer. Targets are names of layers or of whole parts of a model. Only these are pruned; here, the vision tower
and the projector stay dense. Calibration runs the whole model, so the scores of the language part account for images.

Prints the report's summary with the accuracy of the dense, the pruned and the recovered model, and the sparsity of each
part of the model. Takes about 20 seconds.
"""

import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparsefit import RunReport, WandaPruning

IMAGE, QUESTION, ANSWERS = 10, 11, range(10)  # token ids: ten answers, an image patch, a question
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Reader(LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = LlamaConfig(vocab_size=12, pad_token_id=None, **sizes)
        vision = CLIPVisionConfig(image_size=8, patch_size=2, **sizes)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
        self.model = LlavaForConditionalGeneration(config)

    def forward(self, input_ids, pixel_values):  # calibration passes the parts of a batch with these names
        return self.model(input_ids=input_ids, pixel_values=pixel_values).logits[:, -1]

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["input_ids"], batch["pixel_values"]), batch["answer"])

    def validation_step(self, batch, batch_idx):
        answer = self(batch["input_ids"], batch["pixel_values"]).argmax(1)
        self.log("val_accuracy", (answer == batch["answer"]).float().mean(), batch_size=len(answer))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


seed_everything(0)
images, digits = load_digits(return_X_y=True)
images = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
tokens = torch.tensor([*[IMAGE] * 16, QUESTION])
rows = [{"input_ids": tokens, "pixel_values": i, "answer": d} for i, d in zip(images, digits, strict=True)]
train, val = DataLoader(rows[:1400], batch_size=64, shuffle=True), DataLoader(rows[1400:], batch_size=200)
module = Reader()
Trainer(max_epochs=8, **QUIET).fit(module, train, val)

pruning, report = WandaPruning(0.75, targets=["language_model"]), RunReport(tempfile.mkdtemp())
Trainer(max_epochs=2, callbacks=[pruning, report], **QUIET).fit(module, train, val)

matrices = {name: w for name, w in module.named_parameters() if w.ndim == 2 and "embed" not in name}
for part in ("vision_tower", "language_model"):
    weights = torch.cat([weight.flatten() for name, weight in matrices.items() if f".{part}." in name])
    print(f"{part}: {(weights == 0).float().mean():.2%} zeros in its layers")
