"""`prune` on Whisper, Wav2Vec2 and Mamba, whose blocks stand behind convolutions or hold them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from conv_recurrent_networks import blocks_of, one_thread, signals  # noqa: F401
from reference_inputs import covered, spread_weights
from reference_products import check_model, gathered
from torch import Tensor, nn

from sparsefit import PruningConfig, prune

# Whisper


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
    }
    limits = {"vocab_size": 61, "num_mel_bins": 8, "d_model": 16, "max_source_positions": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **limits, **special, max_target_positions=16)
    model = spread_weights(transformers.WhisperForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 61, (3, 6), generator=generator)
    return model, {"input_features": signals(3, 8, 32), "decoder_input_ids": ids}


@pytest.mark.parametrize("selection", [{}, {"granularity": "layer", "sparsity": 0.6}, {"pattern": "2:4"}])
@pytest.mark.parametrize("update", ["none", "block"])
def test_whisper(update, selection):
    model, data = whisper()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update=update, **selection))
    assert result.update == update
    assert not result.notes
    assert covered(model, result)
    for name in ("conv1", "conv2"):
        assert result.left_dense[f"model.encoder.{name}.weight"] == "outside the repeated blocks"
    stages = blocks_of(dense, ["model.encoder.layers", "model.decoder.layers"]) if update == "block" else None
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages, **selection)


def test_the_convolutions_before_the_blocks_of_whisper_come_after_them():
    model, data = whisper()
    dense = copy.deepcopy(model)
    targets = ("conv1", "conv2", "fc1", "fc2")
    result = prune(model, [data], PruningConfig(targets=targets))
    stages = [
        [name for name in names if ".fc" in name]
        for names in blocks_of(dense, ["model.encoder.layers", "model.decoder.layers"])
    ]
    stages.append([f"model.encoder.conv{number}.weight" for number in (1, 2)])
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages)


# Wav2Vec2


def wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    convolutions = {"conv_dim": (8, 8, 8), "conv_stride": (4, 2, 2), "conv_kernel": (6, 3, 2)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.Wav2Vec2Config(**convolutions, **positions, **sizes, vocab_size=20)
    return spread_weights(transformers.Wav2Vec2ForCTC(config)), {"input_values": signals(3, 400)}


@pytest.mark.parametrize("selection", [{}, {"granularity": "layer", "sparsity": 0.6}])
@pytest.mark.parametrize("update", ["none", "block"])
def test_wav2vec2(update, selection):
    model, data = wav2vec2()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update=update, **selection))
    assert result.update == update
    assert covered(model, result)
    of_positions = {name: reason for name, reason in result.left_dense.items() if "pos_conv_embed" in name}
    assert len(of_positions) == 2  # magnitude and direction of one kernel
    assert all("Parametrization" in reason for reason in of_positions.values())
    extractor = [name for name in result.left_dense if "feature_extractor" in name]
    assert [result.left_dense[name] for name in extractor] == ["outside the repeated blocks"] * 3
    assert not result.notes
    stages = blocks_of(dense, ["wav2vec2.encoder.layers"]) if update == "block" else None
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages, **selection)


def test_the_feature_extractor_of_wav2vec2_if_it_is_asked_for():
    model, data = wav2vec2()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(targets=("conv", "intermediate_dense")))
    blocks = [[f"wav2vec2.encoder.layers.{number}.feed_forward.intermediate_dense.weight"] for number in range(2)]
    extractor = [f"wav2vec2.feature_extractor.conv_layers.{number}.conv.weight" for number in range(3)]
    check_model(dense, model, result, lambda model: gathered(model, [data]), [*blocks, extractor])


# Mamba


def mamba() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"vocab_size": 61, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    model = spread_weights(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)))
    return model, {"input_ids": torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(6))}


def gathered_from_mamba(model: nn.Module, batches: list[Any]) -> dict:
    """dt_proj multiplies the first outputs of x_proj, and is never called."""
    steps: dict[str, list[list[Tensor]]] = {}

    def keep(name: str, rank: int, layer: nn.Module, args: tuple, output: Tensor) -> None:
        steps.setdefault(name, [[]])[0].append(output[..., :rank].flatten(0, -2).clone())

    handles = [
        module.x_proj.register_forward_hook(partial(keep, f"{name}.dt_proj.weight", module.time_step_rank))
        for name, module in model.named_modules()
        if hasattr(module, "dt_proj")
    ]
    inputs = gathered(model, batches)
    for handle in handles:
        handle.remove()
    return inputs | steps


@pytest.mark.parametrize("selection", [{}, {"granularity": "layer"}, {"pattern": "2:4"}])
@pytest.mark.parametrize("update", ["none", "block"])
def test_mamba(update, selection):
    model, data = mamba()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update=update, **selection))
    assert not result.notes
    assert covered(model, result)
    layers = ("in_proj", "x_proj", "dt_proj", "out_proj")
    stages = [[f"backbone.layers.{number}.mixer.{name}.weight" for name in layers] for number in range(2)]
    if update == "none":
        stages = [[*stages[0], *stages[1]]]
    check_model(dense, model, result, lambda model: gathered_from_mamba(model, [data]), stages, **selection)
