"""Small runs on streamed text, for the tests of checkpoints."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import QUIET
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefit.callbacks import GPUHourBudget, RunReport, WandaPruning
from sparsefit.callbacks.checkpoint_io import AtomicCheckpointIO
from sparsefit.callbacks.checkpoints import SparseCheckpoints
from sparsefit.data import TextDataModule
from sparsefit.modules import CausalLMModule
from sparsefit.modules.loading import load_tokenizer
from sparsefit.recovery.adapters import AdapterSettings

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards read the documentation of python aloud"
WORDS = TEXT.split(" ")
tokenizer = cache(lambda: load_tokenizer("tiny-llama"))


class DrawsInValidation(CausalLMModule):
    """Draws random numbers in every validation step."""

    def validation_step(self, batch, batch_idx):
        torch.rand(3)


def text_file(folder):
    """Documents of some 20 to 80 tokens, one a line; a batch of `data` has 2 windows of 16."""
    file = folder / "text.jsonl"
    if not file.exists():
        lines = (" ".join(WORDS[(n * 7 + i * i) % len(WORDS)] for i in range(12 + n * 5 % 40)) for n in range(7))
        file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return str(file)


def data(folder, kind=TextDataModule, **settings):
    common = {"sequence_length": 16, "batch_size": 2, "calibration_samples": 4, "calibration": "pack"}
    file = text_file(folder)
    common |= {"train_source": file, "shuffle_buffer": 5, "test_source": file, "test_windows": 2}
    return kind(**({"tokenizer": tokenizer()} | common | settings))


def module(cls=CausalLMModule, settings=None, **adapter):
    """A Llama to prune, with dropout, so that all random numbers matter."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), tie_word_embeddings=True, **SIZES))
    return cls(
        llama, AdapterSettings(**({"r": 2, "dropout": 0.1} | adapter)), **({"learning_rate": 0.01} | (settings or {}))
    )


def callbacks(folder):
    return [SparseCheckpoints(str(folder)), RunReport(str(folder)), WandaPruning(), GPUHourBudget(10.0)]


def every_step(folder, **settings):
    every = {} if settings else {"every_n_train_steps": 1}
    return ModelCheckpoint(folder, save_top_k=-1, **({"filename": "{step}"} | every | settings))


def fit(module, data, *callbacks, ckpt_path=None, warned=None, **settings):
    """A fit like that of the command: with all seeds set and atomic checkpoints; warnings are appended to `warned`."""
    seed_everything(7, verbose=False)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    common = {"max_epochs": 100, "log_every_n_steps": 1, "plugins": [AtomicCheckpointIO()]}
    trainer = Trainer(callbacks=[*callbacks], **(QUIET | common | {"enable_checkpointing": saves} | settings))
    with warnings.catch_warnings(record=warned is not None) as caught:
        warnings.simplefilter("ignore" if warned is None else "always")
        trainer.fit(module, data, ckpt_path=ckpt_path)
    if warned is not None:
        warned += [str(warning.message) for warning in caught]
    return trainer


class Stop(Callback):
    """Raises in a hook, the n-th time it is called."""

    def __init__(self, hook, number, error=KeyboardInterrupt):
        self.left = number
        self.error = error
        setattr(self, hook, self.count)

    def count(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, differing
