"""A custom PEFT model: its base is pruned, its LoRA trained, and both are saved, reloaded and compared.

`WandaPruning` recognizes a PEFT-wrapped model: it prunes the base and never the adapters. The base is frozen,
so nothing needs to run in each step. `RunReport` writes the sparse base once, and PEFT writes the adapter; reloaded,
both give exactly the same outputs. They are not merged: W + B A has no zeros where W has them, so merging plain LoRA
fills the layers that it adapts. To merge, train `AdapterSettings("masked_lora")` or PEFT's HiRA instead.

Prints the report's summary with the perplexity of the dense, the pruned and the recovered model; the difference between
the trained and the reloaded model; and the share of zeros before and after merging. Takes about 20 seconds.
"""

import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsefit import MaskSet, RunReport, WandaPruning

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class LanguageModel(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_perplexity", self.model(**batch).loss.exp())

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


def zeros(model):
    """The share of zeros in the layers that were pruned."""
    masks = MaskSet.load(folder / "run/masks.safetensors")
    return (torch.cat([model.get_parameter(name).flatten() for name in masks]) == 0).float().mean()


seed_everything(0)
folder = Path(tempfile.mkdtemp())

# The text is the docstring of this page as letters, in windows of 64.
letters = sorted(set(__doc__))
windows = torch.tensor([letters.index(letter) for letter in __doc__]).unfold(0, 64, 2)
rows = [{"input_ids": window, "labels": window} for window in windows]
train, val = DataLoader(rows, batch_size=32, shuffle=True), DataLoader(rows, batch_size=len(rows))
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), pad_token_id=None, **sizes))
Trainer(max_epochs=8, **QUIET).fit(LanguageModel(llama), train, val)

# The model is wrapped by PEFT, not by this package.
own = get_peft_model(llama, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"))
module = LanguageModel(own)
Trainer(max_epochs=4, callbacks=[WandaPruning(0.5), RunReport(str(folder / "run"))], **QUIET).fit(module, train, val)
own.save_pretrained(folder / "adapter")

base = AutoModelForCausalLM.from_pretrained(folder / "run/base")
zeros_of_base = zeros(base)
loaded = PeftModel.from_pretrained(base, folder / "adapter")
batch = windows[:4]
with torch.no_grad():
    difference = (own.eval()(input_ids=batch).logits - loaded.eval()(input_ids=batch).logits).abs().max()
print(f"largest difference after reloading: {float(difference)}")
zeros_of_merged = zeros(loaded.merge_and_unload())
print(f"zeros in the pruned layers: {zeros_of_base:.2%} in the base, {zeros_of_merged:.2%} after merging plain LoRA")
