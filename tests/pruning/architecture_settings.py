"""Common settings of the configurations of tiny transformers models, by kind of model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

VOCABULARY, WIDTH = 61, 32
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
DECODER = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ENCODER = {name: value for name, value in DECODER.items() if name not in ("num_key_value_heads", "head_dim")}
GPT = SPECIAL | {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64}
EXPERTS = DECODER | {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24}
GROUPED = EXPERTS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = GROUPED | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
STATES = DECODER | {"state_size": 4, "time_step_rank": 4, "conv_kernel": 3}
MAMBA2 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
SEQUENCES = SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
T5 = SPECIAL | {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SPEECH = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
PATCHES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [2, 1, 2, 1]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
CVT = {
    "embed_dim": [16, 32],
    "num_heads": [1, 2],
    "depth": [2, 2],
    "cls_token": [False, True],
    "patch_sizes": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [2, 1],
    "qkv_projection_method": ["dw_bn", "dw_bn"],
    **{name: [1, 1] for name in ("stride_q", "padding_q", "padding_kv")},
    **{name: [0.0, 0.0] for name in ("drop_rate", "drop_path_rate", "attention_drop_rate")},
    "kernel_qkv": [3, 3],
    "stride_kv": [2, 2],
    "mlp_ratio": [2.0, 2.0],
    "qkv_bias": [True, True],
}
LABELS = {"num_labels": 5}
TOWERS = {"text_config": ENCODER | {"projection_dim": 16}, "vision_config": PATCHES, "projection_dim": 16}
IMAGE_TOKEN = 60


class Architecture(NamedTuple):
    """The settings of a tiny model.

    Attributes:
        kind: What sort of model.
        family: The part of the names of its classes that configuration and model share.
        head: The rest of the model's.
        settings: Of the configuration.
        blocks: The lists of repeated blocks, in calling order, as the code of the model has them; those alone that hand
            a hidden state of one shape from block to block.
        data: What goes through it: a key of `SAMPLES` in `tiny_transformers`.
    """

    kind: str
    family: str
    head: str
    settings: dict[str, Any]
    blocks: tuple[str, ...]
    data: str = "text"


def decoder(family: str, settings: dict[str, Any] = DECODER, blocks: str = "model.layers", **more: Any) -> Architecture:
    return Architecture("decoder", family, "ForCausalLM", settings | more, (blocks,))


def experts(family: str, settings: dict[str, Any] = EXPERTS, blocks: str = "model.layers", **more: Any) -> Architecture:
    return Architecture("experts", family, "ForCausalLM", settings | more, (blocks,))


def states(family: str, blocks: str = "model.layers", settings: dict[str, Any] = STATES, **more: Any) -> Architecture:
    return Architecture("state space", family, "ForCausalLM", settings | more, (blocks,))


def encoder(family: str, head: str, blocks: str, settings: dict[str, Any] = ENCODER, **more: Any) -> Architecture:
    return Architecture("encoder", family, head, settings | LABELS | more, (blocks,))


def both(family: str, settings: dict[str, Any] = SEQUENCES, blocks: str = "model.{}.layers", **more: Any):
    lists = tuple(blocks.format(side) for side in ("encoder", "decoder"))
    return Architecture("encoder-decoder", family, "ForConditionalGeneration", settings | more, lists, "text to text")


def speech(family: str, head: str = "ForCTC", **more: Any) -> Architecture:
    return Architecture("speech", family, head, SPEECH | more, (f"{family.lower()}.encoder.layers",), "sound")


def vision(family: str, blocks: str, settings: dict[str, Any] = PATCHES, stages: Iterable[int] = (0,), **more: Any):
    lists = tuple(blocks.format(stage) for stage in stages)
    return Architecture("vision", family, "ForImageClassification", settings | LABELS | more, lists, "images")
