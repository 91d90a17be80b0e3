"""Tiny random transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOW = 5  # shorter than the sequences of the tests

# Name of the transformers classes (before "Config" and the head), the head, and the configuration.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", SIZES),
    "mistral": ("Mistral", "ForCausalLM", SIZES | {"sliding_window": WINDOW}),
    "qwen3": ("Qwen3", "ForCausalLM", SIZES | {"head_dim": 8}),
    "gemma3": (
        "Gemma3",
        "ForCausalLM",
        SIZES
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("Mixtral", "ForCausalLM", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPT", "ForCausalLM", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", SIZES),
    "bloom": ("Bloom", "ForCausalLM", SPECIAL | {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        SPECIAL | {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4},
    ),
    "bert": ("Bert", "ForMaskedLM", SIZES),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        SPECIAL
        | {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
}


def two_blocks(architecture: str) -> nn.Module:
    """A tiny random model of two blocks, if three would only take longer."""
    return make_tiny_model(architecture, **{"n_layer" if architecture == "gpt2" else "num_hidden_layers": 2})


def make_tiny_model(architecture: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny random transformers model of an architecture, with changes of its configuration."""
    import transformers

    family, head, settings = ARCHITECTURES[architecture]
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return spread(getattr(transformers, family + head)(getattr(transformers, name)(**(settings | changes))), seed)


def save_llama(folder: Path, **sizes: int) -> nn.Module:
    """Save a random Llama of two blocks, or of other sizes, with the tokenizer of the package's small model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparsefit.modules.loading import load_tokenizer

    tokenizer = load_tokenizer("tiny-llama")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(small | sizes)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model random weights larger than usual, so that every layer, head and mask matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2, generator=generator))
    return model.eval()
