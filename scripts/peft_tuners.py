"""What pruning under an adapter does to it, for every tuner of the installed PEFT: measured on tiny random models.

    python scripts/peft_tuners.py            # the table of docs/adapters.md
    python scripts/peft_tuners.py lora osf   # some tuners only

Each adapter is made on a dense model, given random values as if it had been trained, and its base is pruned under it to
50% (Wanda). Base and adapter are written, and read again with plain transformers and PEFT: once with none of the
package's rules for adapters, once with them.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import ConfigError
from sparsefit.pruning import targets
from sparsefit.pruning.naming import base_modules
from sparsefit.recovery.adapter_files import export_adapter
from sparsefit.recovery.export import WEIGHTS_FILE, export_base
from sparsefit.recovery.magnitudes import magnitudes_follow

TARGETS = ["q_proj", "v_proj", "o_proj"]  # square, wide and square
SMALL = {"target_modules": TARGETS}
LOW = SMALL | {"r": 4}
IN_ONE_PASS = ("Poly", "LoRA aLoRA", "Prefix tuning", "Cartridge")
LM = {"task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Case:
    """One way to make an adapter."""

    tuner: str
    variant: str
    make: Callable[[nn.Module], nn.Module]
    model: str = "llama"

    @property
    def name(self) -> str:
        """The tuner, its variant and the model, if that is another than the usual one."""
        return " ".join(filter(None, (self.tuner, self.variant, "" if self.model == "llama" else f"({self.model})")))


def of_config(kind: str, **settings: Any) -> Callable[[nn.Module], nn.Module]:
    """Wraps a model by the configuration of this name."""
    return lambda model: get_peft_model(model, getattr(peft, kind)(**settings))


def with_corda(model: nn.Module) -> nn.Module:
    """CorDA looks at activations before it makes its adapters."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"), lora_alpha=8, **LOW, **LM
    )
    preprocess_corda(model, config, run_model=lambda: [model(**{"input_ids": row[None]}) for row in inputs(model)["input_ids"]])
    return get_peft_model(model, config)


def with_eva(model: nn.Module) -> nn.Module:
    """EVA does so afterwards."""
    from peft import EvaConfig, initialize_lora_eva_weights

    config = peft.LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **LOW, **LM)
    adapted = get_peft_model(model, config)
    data = [inputs(model) for _ in range(4)]
    initialize_lora_eva_weights(adapted, data, show_progress_bar=False)
    return adapted


def with_lora_ga(model: nn.Module) -> nn.Module:
    """LoRA-GA looks at gradients before."""
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config = peft.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), lora_alpha=8, **LOW, **LM)

    def step() -> None:
        batch = inputs(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()

    preprocess_loraga(model, config, step)
    return get_peft_model(model, config)


def with_loftq(model: nn.Module) -> nn.Module:
    """LoftQ needs scipy and quantizes on the way."""
    return get_peft_model(
        model, peft.LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}, **LOW, **LM)
    )


def with_xlora(model: nn.Module) -> nn.Module:
    """X-LoRA mixes adapters that lie on disk."""
    folder = tempfile.mkdtemp()
    get_peft_model(copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False, **LOW, **LM)).save_pretrained(folder)
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, adapters={"0": folder, "1": folder}
    )
    return get_peft_model(model, config)


def lora(variant: str, model: str = "llama", **settings: Any) -> Case:
    """A case of LoRA."""
    common = LOW | LM if model == "llama" else LOW
    return Case("LoRA", variant, of_config("LoraConfig", **(common | settings)), model)


def cases() -> Iterator[Case]:
    """All tuners, and those of their settings that change how they come to be."""
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
    yield lora("BD-LoRA", use_bdlora=_made("BdLoraConfig", target_modules_bd_a=["q_proj", "v_proj"], nblocks=2, match_strict=False))
    yield lora("KaSA", kasa_config=_made("KasaConfig"))
    yield lora("MonteCLoRA", monteclora_config=_made("MontecloraConfig"))
    yield lora("VeLoRA", velora_config=_made("VeloraConfig"))
    yield lora("", model="conv", target_modules=["conv", "linear"])
    yield lora("DoRA", model="conv", target_modules=["conv", "linear"], use_dora=True)
    yield lora("mha", model="mha", target_modules=["self_attn"])
    yield Case("AdaLoRA", "", of_config("AdaLoraConfig", init_r=4, total_step=100, tinit=5, tfinal=10, **SMALL, **LM))
    yield Case("X-LoRA", "", with_xlora)
    yield Case("IA3", "", of_config("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"],
                                    feedforward_modules=["down_proj"], **LM))
    yield Case("IA3", "", of_config("IA3Config", target_modules=["query", "output.dense"],
                                    feedforward_modules=["output.dense"]), "bert")
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
    yield Case("VeRA", "projection not saved", of_config("VeraConfig", r=4, target_modules=["q_proj"],
                                                         save_projection=False))
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
    yield Case("Supertuning", "indices not saved", of_config("SupertuningConfig", sparsity=0.9,
                                                             save_precomputed_indices=False, **SMALL))
    yield Case("DEFT", "", of_config("DeftConfig", **LOW))
    yield Case("DEFT", "PaRa", of_config("DeftConfig", para=True, **LOW))
    yield Case("BEFT", "", of_config("BeftConfig", target_modules=["query"]), "bert")
    yield Case("LN tuning", "", of_config("LNTuningConfig", target_modules=["norm", "input_layernorm"], **LM))
    yield Case("Trainable tokens", "", of_config("TrainableTokensConfig", token_indices=[1, 2], **LM))
    yield Case("Poly", "", of_config("PolyConfig", r=4, n_tasks=2, n_skills=2, **SMALL, **LM))
    yield Case("Prompt tuning", "", of_config("PromptTuningConfig", num_virtual_tokens=4, **LM))
    yield Case("P-tuning", "", of_config("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16, **LM))
    yield Case("Prefix tuning", "", of_config("PrefixTuningConfig", num_virtual_tokens=4, **LM))
    yield Case("Multitask prompt", "", of_config("MultitaskPromptTuningConfig", num_virtual_tokens=4, num_tasks=2, **LM))
    yield Case("CPT", "", of_config("CPTConfig", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **LM))
    yield Case("Cartridge", "", of_config("CartridgeConfig", num_virtual_tokens=4, num_frozen_tokens=1, **LM))
    yield Case("Adaption prompt", "", of_config("AdaptionPromptConfig", adapter_len=4, adapter_layers=2, **LM))
    yield Case("Shadow", "", of_config("ShadowConfig", r=4, shadow_num_hidden_layers=1, **LM))


def _made(kind: str, **settings: Any) -> Any:
    return getattr(importlib.import_module("peft.tuners.lora.config"), kind)(**settings)


class Convolutions(nn.Module):
    """Convolutions that are no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 36, 24)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.out(self.linear(self.norm(self.conv(x)).relu().flatten(1)).relu())


class Attention(nn.Module):
    """torch's own attention."""

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
    """A tiny model of random weights, always the same ones."""
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
    tokens[:, 4] = 5  # aLoRA waits for it
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    tuners = {config.peft_type.value for config in getattr(model, "peft_config", {}).values()}
    if tuners & {"POLY", "MULTITASK_PROMPT_TUNING"}:
        batch["task_ids"] = torch.zeros(3, dtype=torch.long)
    return batch


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the bare model, by name."""
    return {
        f"{name}.{key}".lstrip("."): tensor
        for name, module in base_modules(model).items()
        for key, tensor in module.named_parameters(recurse=False)
    }


@dataclass
class Findings:
    """What came of a case.

    Attributes:
        changes_base: Whether weights of the base were others once the adapter was made.
        takes_from_base: Whether the adapter is another one if it is made on other weights.
        without: The largest difference of a logit between the model in memory and what PEFT writes of it; or an error.
        reload: The same by the rules of the package; None where it refuses the model.
        unchanged: Where it is refused: whether the model is then as it was, to the bit.
        fits: Whether the masks are those of the weights that are pruned without the adapter, by the names in the file.
        filled: How many of the pruned weights PEFT's merge fills again.
        pruned: How many weights are pruned.
        error: Why a case could not be made, a merge not be done, or a model is refused.
    """

    changes_base: bool | None = None
    takes_from_base: bool | None = None
    without: float | str | None = None
    reload: float | None = None
    unchanged: bool | None = None
    fits: bool | None = None
    filled: int | None = None
    pruned: int = 0
    error: str = ""


def measure(case: Case) -> Findings:
    """Make, train, prune, write and read one adapter, with the rules of the package and without them."""
    found = Findings()
    try:
        adapted = case.make(dense_model(case.model)).eval()
    except Exception as error:  # it is what the table reports
        found.error = f"{type(error).__name__}: {error}"
        return found
    before = base_weights(dense_model(case.model))
    found.changes_base = any(not torch.equal(before[k], w) for k, w in base_weights(adapted).items() if k in before)
    found.takes_from_base = takes_from_base(case)
    found.without = without_rules(case)
    train(adapted)
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    try:
        masks = pruned(adapted, case)
    except ConfigError as refusal:
        found.error = str(refusal)
        found.unchanged = all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())
        return found
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base"), Path(folder, "adapter")
        exported = export_base(adapted, masks, base)
        export_adapter(adapted, masks, base, adapter)
        found.reload = difference(adapted, read(case, base, adapter), case)
        bare = read(case, base)
        found.fits = set(exported) == set(pruned(dense_model(case.model), case)) or case.model == "mha"
        exported.verify(bare)
    count_filled(adapted, exported, found)
    return found


def takes_from_base(case: Case) -> bool:
    """Whether adapters differ that are made from the same seed on two bases."""
    made = []
    for share in (0.0, 0.5):
        model = dense_model(case.model)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight[torch.rand(weight.shape) < share] = 0
        torch.manual_seed(3)
        adapted = case.make(model)
        own = {id(weight) for weight in base_weights(adapted).values()}
        tensors = (*adapted.named_parameters(), *adapted.named_buffers())
        made.append({name: tensor for name, tensor in tensors if id(tensor) not in own})
    one, other = made
    return any(name not in other or not _same(tensor, other[name]) for name, tensor in one.items())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def without_rules(case: Case) -> float | str:
    """The largest difference of a logit where PEFT alone prepares, writes and reads the adapter."""
    checks = targets.CHECKS.copy()
    targets.CHECKS.clear()
    try:
        adapted = case.make(dense_model(case.model)).eval()
        train(adapted)
        masks = pruned(adapted, case)
        with tempfile.TemporaryDirectory() as folder:
            base, adapter = Path(folder, "base"), Path(folder, "adapter")
            export_base(adapted, masks, base)
            adapted.save_pretrained(adapter)
            return difference(adapted, read(case, base, adapter), case)
    except Exception as error:  # it is what the table reports
        return type(error).__name__
    finally:
        targets.CHECKS[:] = checks


@torch.no_grad()
def train(adapted: nn.Module) -> None:
    """Give what trains other values, as training does."""
    torch.manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(0.05 * torch.randn_like(parameter))


def pruned(model: nn.Module, case: Case) -> MaskSet:
    """Prune a model, or the base under an adapter."""
    batches = [inputs(model, case.model, seed) for seed in (2, 3)]
    update = "none" if case.name in IN_ONE_PASS else "block"
    with magnitudes_follow(model):
        return prune(model, batches, PruningConfig(sparsity=0.5, update=update)).masks


def read(case: Case, base: Path, adapter: Path | None = None) -> nn.Module:
    """What plain transformers and PEFT make of the files."""
    torch.manual_seed(11)
    if case.model in ("llama", "bert"):
        of = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}[case.model]
        model = getattr(transformers, of).from_pretrained(base)
    else:
        model = dense_model(case.model)
        model.load_state_dict(load_file(base / WEIGHTS_FILE))
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, case: Case) -> float:
    """The largest difference of a logit between two models."""
    found = []
    for model in (one, other):
        batch = inputs(model, case.model, 7)
        logits = model(**batch) if isinstance(batch, dict) else model(batch)
        found.append(getattr(logits, "logits", logits))
    return float((found[0] - found[1]).abs().max())


def count_filled(adapted: nn.Module, masks: MaskSet, found: Findings) -> None:
    """Merge as PEFT does it, and count."""
    found.pruned = sum(zeros for _, zeros in masks.counts().values())
    try:
        whole = copy.deepcopy(adapted).merge_and_unload()
    except (NotImplementedError, AttributeError) as error:
        found.error = f"{type(error).__name__}: {error}"
        return
    found.filled = sum(masks.alive(name, matrix) for name, matrix in masks.matrices_in(whole))


def row(case: Case, found: Findings) -> str:
    """A line of the table."""
    if found.without is None:
        return f"| {case.name} | could not be made here: {found.error.splitlines()[0][:60]} | | | | |"
    without = found.without if isinstance(found.without, str) else f"{found.without:.2g}" if found.without else "0.0"
    here = "refused" if found.reload is None else str(found.reload)
    if found.unchanged is False or found.fits is False:
        here += " (!)"
    merge = "" if found.reload is None else "no merge" if found.filled is None else f"{found.filled:,} of {found.pruned:,}"
    yes = {True: "yes", False: ""}
    return (
        f"| {case.name} | {yes[found.changes_base]} | {yes[found.takes_from_base]} | {without} | {here} | {merge} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuners", nargs="*", help="names of tuners; all by default")
    only = [name.lower() for name in parser.parse_args().tuners]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| tuner | changes its base | takes from its base | reload by PEFT alone | reload here | zeros filled by merging |")
    print("|---|---|---|---|---|---|")
    for case in cases():
        if not only or case.tuner.lower() in only:
            print(row(case, measure(case)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
