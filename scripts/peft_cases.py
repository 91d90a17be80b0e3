"""Adapters of every tuner of the installed PEFT, on tiny models with random weights."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

TARGETS = ["q_proj", "v_proj", "o_proj"]  # square, wide and square
SMALL = {"target_modules": TARGETS}
LOW = SMALL | {"r": 4}
IN_ONE_PASS = ("Poly", "LoRA aLoRA", "Prefix tuning", "Cartridge")
LM = {"task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Case:
    """One way to create an adapter."""

    tuner: str
    variant: str
    make: Callable[[nn.Module], nn.Module]
    model: str = "llama"

    @property
    def name(self) -> str:
        """The tuner, its variant, and the model if it is not the Llama."""
        return " ".join(filter(None, (self.tuner, self.variant, "" if self.model == "llama" else f"({self.model})")))


def of_config(kind: str, **settings: Any) -> Callable[[nn.Module], nn.Module]:
    """A function that wraps a model with the PEFT configuration of this name."""
    return lambda model: get_peft_model(model, getattr(peft, kind)(**settings))


def with_corda(model: nn.Module) -> nn.Module:
    """CorDA: needs activations before it is created."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"), lora_alpha=8, **LOW, **LM
    )
    preprocess_corda(
        model, config, run_model=lambda: [model(**{"input_ids": row[None]}) for row in inputs(model)["input_ids"]]
    )
    return get_peft_model(model, config)


def with_eva(model: nn.Module) -> nn.Module:
    """EVA: needs activations after it is created."""
    from peft import EvaConfig, initialize_lora_eva_weights

    config = peft.LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **LOW, **LM)
    adapted = get_peft_model(model, config)
    data = [inputs(model) for _ in range(4)]
    initialize_lora_eva_weights(adapted, data, show_progress_bar=False)
    return adapted


def with_lora_ga(model: nn.Module) -> nn.Module:
    """LoRA-GA: needs gradients before it is created."""
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config = peft.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), lora_alpha=8, **LOW, **LM)

    def step() -> None:
        batch = inputs(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()

    preprocess_loraga(model, config, step)
    return get_peft_model(model, config)


def with_loftq(model: nn.Module) -> nn.Module:
    """LoftQ: needs scipy; quantizes while it is created."""
    return get_peft_model(
        model, peft.LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}, **LOW, **LM)
    )


def with_xlora(model: nn.Module) -> nn.Module:
    """X-LoRA: mixes adapters saved on disk."""
    folder = tempfile.mkdtemp()
    get_peft_model(copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False, **LOW, **LM)).save_pretrained(folder)
    model.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, adapters={"0": folder, "1": folder})
    return get_peft_model(model, config)


def lora(variant: str, model: str = "llama", **settings: Any) -> Case:
    """A case of LoRA."""
    common = LOW | LM if model == "llama" else LOW
    return Case("LoRA", variant, of_config("LoraConfig", **(common | settings)), model)


def cases() -> Iterator[Case]:
    """All tuners, and those of their settings that change their initialization."""
    yield lora("")
    yield lora("DoRA", use_dora=True)
    yield lora("rsLoRA", use_rslora=True)
    yield lora("bias", bias="all", model="bert", target_modules=["query", "value"])
    yield lora("embedding", target_modules=["q_proj", "embed_tokens"])
    yield lora("modules_to_save", modules_to_save=["lm_head"])
    yield lora("trainable tokens", trainable_token_indices=[1, 2])
    for name in ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica"):
        yield lora(name, init_lora_weights=name)
    yield lora("PiSSA + DoRA", init_lora_weights="pissa", use_dora=True)
    yield Case("LoRA", "loftq", with_loftq)
    yield Case("LoRA", "corda", with_corda)
    yield Case("LoRA", "eva", with_eva)
    yield Case("LoRA", "lora_ga", with_lora_ga)
    yield lora("aLoRA", alora_invocation_tokens=[5])
    yield lora(
        "BD-LoRA",
        use_bdlora=_made("BdLoraConfig", target_modules_bd_a=["q_proj", "v_proj"], nblocks=2, match_strict=False),
    )
    yield lora("KaSA", kasa_config=_made("KasaConfig"))
    yield lora("MonteCLoRA", monteclora_config=_made("MontecloraConfig"))
    yield lora("VeLoRA", velora_config=_made("VeloraConfig"))
    yield lora("", model="conv", target_modules=["conv", "linear"])
    yield lora("DoRA", model="conv", target_modules=["conv", "linear"], use_dora=True)
    yield lora("mha", model="mha", target_modules=["self_attn"])
    yield Case("AdaLoRA", "", of_config("AdaLoraConfig", init_r=4, total_step=100, tinit=5, tfinal=10, **SMALL, **LM))
    yield Case("X-LoRA", "", with_xlora)
    yield Case(
        "IA3",
        "",
        of_config(
            "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **LM
        ),
    )
    yield Case(
        "IA3",
        "",
        of_config("IA3Config", target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
        "bert",
    )
    yield Case("IA3", "", of_config("IA3Config", target_modules=["conv", "linear"], feedforward_modules=[]), "conv")
    for kind, name in (("LoHaConfig", "LoHa"), ("LoKrConfig", "LoKr")):
        yield Case(name, "", of_config(kind, **LOW))
        yield Case(name, "", of_config(kind, r=4, target_modules=["conv", "linear"]), "conv")
    yield Case("LoKr", "lycoris", of_config("LoKrConfig", init_weights="lycoris", **LOW))
    yield Case("OFT", "", of_config("OFTConfig", oft_block_size=4, use_cayley_neumann=False, **SMALL))
    yield Case("OFT", "", of_config("OFTConfig", r=0, oft_block_size=4, target_modules=["linear"]), "conv")
    yield Case("BOFT", "", of_config("BOFTConfig", boft_block_size=4, **SMALL))
    yield Case("HRA", "", of_config("HRAConfig", **LOW))
    yield Case("VeRA", "", of_config("VeraConfig", r=4, target_modules=["q_proj"], save_projection=True))
    yield Case(
        "VeRA", "projection not saved", of_config("VeraConfig", r=4, target_modules=["q_proj"], save_projection=False)
    )
    yield Case("PVeRA", "", of_config("PveraConfig", r=4, target_modules=["q_proj"]))
    yield Case("VB-LoRA", "", of_config("VBLoRAConfig", r=4, num_vectors=8, vector_length=8, topk=2, **SMALL))
    yield Case("Uni-LoRA", "", of_config("UniLoraConfig", r=4, theta_d_length=64, **SMALL))
    yield Case("RandLoRA", "", of_config("RandLoraConfig", r=4, **SMALL))
    yield Case("FourierFT", "", of_config("FourierFTConfig", n_frequency=50, **SMALL))
    yield Case("WaveFT", "", of_config("WaveFTConfig", n_frequency=50, **SMALL))
    yield Case("C3A", "", of_config("C3AConfig", block_size=8, **SMALL))
    yield Case("SHiRA", "", of_config("ShiraConfig", random_seed=3, **LOW))
    yield Case("HiRA", "", of_config("HiraConfig", **LOW))
    yield Case("HiRA", "", of_config("HiraConfig", r=4, target_modules=["conv", "linear"]), "conv")
    yield Case("RoAd", "", of_config("RoadConfig", group_size=8, **SMALL))
    yield Case("MiSS", "", of_config("MissConfig", r=4, **SMALL))
    yield Case("MiSS", "bat", of_config("MissConfig", r=4, init_weights="bat", target_modules=["q_proj", "o_proj"]))
    yield Case("MiSS", "mini", of_config("MissConfig", r=4, mini_r=4, init_weights="mini", **SMALL))
    yield Case("DeLoRA", "", of_config("DeloraConfig", r=4, delora_lambda=15, **SMALL))
    yield Case("GraLoRA", "", of_config("GraloraConfig", r=4, gralora_k=2, **SMALL))
    yield Case("GLoRA", "", of_config("GloraConfig", **LOW))
    yield Case("Lily", "", of_config("LilyConfig", r=4, stride_A=1, num_B=2, **SMALL))
    yield Case("PEANuT", "", of_config("PeanutConfig", **LOW))
    yield Case("PSOFT", "", of_config("PsoftConfig", **LOW))
    yield Case("OSF", "", of_config("OSFConfig", effective_rank=4, **SMALL))
    yield Case("TinyLoRA", "", of_config("TinyLoraConfig", r=2, u=4, **SMALL))
    yield Case("FRoD", "", of_config("FrodConfig", **SMALL))
    yield Case("AdaMSS", "", of_config("AdamssConfig", r=8, num_subspaces=2, subspace_rank=1, **SMALL))
    yield Case("Supertuning", "", of_config("SupertuningConfig", sparsity=0.9, **SMALL))
    yield Case(
        "Supertuning",
        "indices not saved",
        of_config("SupertuningConfig", sparsity=0.9, save_precomputed_indices=False, **SMALL),
    )
    yield Case("DEFT", "", of_config("DeftConfig", **LOW))
    yield Case("DEFT", "PaRa", of_config("DeftConfig", para=True, **LOW))
    yield Case("BEFT", "", of_config("BeftConfig", target_modules=["query"]), "bert")
    yield Case("LN tuning", "", of_config("LNTuningConfig", target_modules=["norm", "input_layernorm"], **LM))
    yield Case("Trainable tokens", "", of_config("TrainableTokensConfig", token_indices=[1, 2], **LM))
    yield Case("Poly", "", of_config("PolyConfig", r=4, n_tasks=2, n_skills=2, **SMALL, **LM))
    yield Case("Prompt tuning", "", of_config("PromptTuningConfig", num_virtual_tokens=4, **LM))
    yield Case("P-tuning", "", of_config("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16, **LM))
    yield Case("Prefix tuning", "", of_config("PrefixTuningConfig", num_virtual_tokens=4, **LM))
    yield Case(
        "Multitask prompt", "", of_config("MultitaskPromptTuningConfig", num_virtual_tokens=4, num_tasks=2, **LM)
    )
    yield Case(
        "CPT", "", of_config("CPTConfig", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **LM)
    )
    yield Case("Cartridge", "", of_config("CartridgeConfig", num_virtual_tokens=4, num_frozen_tokens=1, **LM))
    yield Case("Adaption prompt", "", of_config("AdaptionPromptConfig", adapter_len=4, adapter_layers=2, **LM))
    yield Case("Shadow", "", of_config("ShadowConfig", r=4, shadow_num_hidden_layers=1, **LM))


def _made(kind: str, **settings: Any) -> Any:
    return getattr(importlib.import_module("peft.tuners.lora.config"), kind)(**settings)


class Convolutions(nn.Module):
    """A convolutional network that is not a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 36, 24)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.out(self.linear(self.norm(self.conv(x)).relu().flatten(1)).relu())


class Attention(nn.Module):
    """A model with `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of sequences."""
        return self.out(self.self_attn(x, x, x)[0])


SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def dense_model(kind: str) -> nn.Module:
    """A tiny model with random weights, the same in each call."""
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    return {"conv": Convolutions, "mha": Attention}[kind]().eval()


def inputs(model: nn.Module, kind: str = "llama", seed: int = 1) -> Any:
    """A batch for a model."""
    drawn = torch.Generator().manual_seed(seed)
    if kind == "conv":
        return torch.randn(3, 3, 6, 6, generator=drawn)
    if kind == "mha":
        return torch.randn(3, 7, 32, generator=drawn)
    tokens = torch.randint(6, 61, (3, 12), generator=drawn)
    tokens[:, 4] = 5  # the invocation token of aLoRA
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    tuners = {config.peft_type.value for config in getattr(model, "peft_config", {}).values()}
    if tuners & {"POLY", "MULTITASK_PROMPT_TUNING"}:
        batch["task_ids"] = torch.zeros(3, dtype=torch.long)
    return batch
