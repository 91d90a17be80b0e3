"""Writes a language model to a GGUF file, which llama.cpp and programs based on it read, with the package gguf."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsefit.errors import ConfigError
from sparsefit.serving.zero_checks import Array

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""The supported model types, and GGUF's names for them."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLITS = {
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""llama.cpp's names for the regular expressions with which tokenizers split text."""


def write_gguf(model: PreTrainedModel, tokenizer_folder: Path, file: Path) -> None:
    """Write a model and its tokenizer.

    Matrices keep the model's dtype. Other tensors are float32, as llama.cpp requires.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3.
        tokenizer_folder: The folder of its tokenizer.json.
        file: The file to write.

    Raises:
        ConfigError: if GGUF cannot express the model or its tokenizer. Nothing is written then.
    """
    import gguf

    check_model(model, tokenizer_folder)
    config = model.config
    kind = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, kind)
    _add_settings(writer, config)
    _add_tokenizer(writer, tokenizer_folder, config.vocab_size)
    architecture = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in model.named_parameters():  # which lists tied weights once
        _add_tensor(writer, names.get_name(name, try_suffixes=(".weight", ".bias")), _as_stored(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_model(model: PreTrainedModel, tokenizer_folder: Path) -> None:
    """Check that a model can be written.

    Raises:
        ConfigError: if it cannot; with the reason.
    """
    config = model.config
    alternative = "llama.cpp's convert_hf_to_gguf.py may support it"
    if config.model_type not in ARCHITECTURES or not hasattr(model, "lm_head"):
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"a {type(model).__name__} is not written as GGUF, only decoders of {known}: {alternative}")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ("default", "linear"):
        raise ConfigError(f"rotary positions of the type {rope} are not written as GGUF: {alternative}")
    layers = getattr(config, "layer_types", None) or []
    if "sliding_attention" in layers or (config.model_type == "mistral" and config.sliding_window):
        raise ConfigError(f"sliding-window attention is not written as GGUF: {alternative}")
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"a GGUF file includes the tokenizer, and {tokenizer_folder} has no tokenizer.json: put it there"
        )
    tokenizer = _tokenizer_of(tokenizer_folder)
    if tokenizer["model"]["type"] != "BPE":
        raise ConfigError(f"the tokenizer in {tokenizer_folder} does not use byte pairs (BPE), the only supported kind")
    if not tokenizer["model"].get("byte_fallback"):
        pre_tokenizer(tokenizer)


def matrices_in(file: Path) -> Iterator[Array]:
    """The matrices of a GGUF file as floats, one at a time."""
    import gguf

    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            yield gguf.dequantize(tensor.data, tensor.tensor_type)


def _add_settings(writer: GGUFWriter, config: Any) -> None:
    import gguf

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_vocab_size(config.vocab_size)


def _as_stored(name: str, weight: Tensor, config: Any) -> Tensor:
    """A weight in llama.cpp's order, in which a Llama's rotary pairs are adjacent."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if ARCHITECTURES[config.model_type] != "llama" or heads is None:
        return weight.detach()
    halves = weight.detach().view(heads, 2, -1, *weight.shape[1:])  # (heads, 2, head_dim / 2, in)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _add_tensor(writer: GGUFWriter, name: str, weight: Tensor) -> None:
    import gguf

    if weight.ndim > 1 and weight.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quantize(weight.float().numpy(), kind), raw_dtype=kind)
    else:
        half = weight.ndim > 1 and weight.dtype == torch.float16
        writer.add_tensor(name, weight.numpy() if half else weight.float().numpy())


def _add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    import gguf

    saved = _tokenizer_of(folder)
    texts = {number: text for text, number in saved["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for added in saved.get("added_tokens", []):
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    by_bytes = bool(saved["model"].get("byte_fallback"))  # as in SentencePiece, which llama.cpp calls "llama"
    for number, text in texts.items():
        if by_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kinds[number] = gguf.TokenType.BYTE
    writer.add_tokenizer_model("llama" if by_bytes else "gpt2")
    writer.add_tokenizer_pre("default" if by_bytes else pre_tokenizer(saved))
    # Embedding rows beyond the tokenizer's tokens need names that are unique.
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in range(size)])
    if by_bytes:
        writer.add_token_scores([-float(number) for number in range(size)])  # merged in the order of the vocabulary
    gguf.SpecialVocab(folder, load_merges=not by_bytes, n_vocab=size).add_to_gguf(writer, quiet=True)


def pre_tokenizer(saved: dict[str, Any]) -> str:
    """llama.cpp's name for the rule by which a byte-level tokenizer splits text before it joins pairs.

    Raises:
        ConfigError: if there is none. With the name of another rule, text would become other tokens.

    >>> pre_tokenizer({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}})
    'gpt-2'
    """
    found = saved.get("pre_tokenizer") or {}
    *first, last = found.get("pretokenizers") or [found]
    name = None
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and len(first) < 2:
        splits = first[0] if first else {}
        own_split = last.get("use_regex", True)  # GPT-2's
        if not first and own_split:
            name = "gpt-2"
        elif splits.get("type") == "Digits" and splits.get("individual_digits") and own_split:
            name = "smollm"
        elif splits.get("type") == "Split" and not own_split:
            name = _SPLITS.get((splits.get("pattern") or {}).get("Regex"))
    if name is None:
        raise ConfigError(
            "the tokenizer's rule for splitting text is not one that can be written to GGUF "
            f"({', '.join(['gpt-2', 'smollm', *_SPLITS.values()])}): llama.cpp's convert_hf_to_gguf.py may support it"
        )
    return name


def _tokenizer_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
