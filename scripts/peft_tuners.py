"""Measures on tiny random models how pruning the base affects an adapter, for every tuner of the installed PEFT.

    python scripts/peft_tuners.py            # the table of docs/adapters.md
    python scripts/peft_tuners.py lora osf   # some tuners only

Each adapter is created on a dense model and given random values as if it had been trained. Then its base is pruned to
50% (Wanda). Base and adapter are saved, and loaded with plain transformers and PEFT: once without the package's rules
for adapters, once with them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from peft_cases import IN_ONE_PASS, Case, cases, dense_model, inputs
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.bare_model import base_modules
from sparsefit.errors import ConfigError
from sparsefit.pruning import targets
from sparsefit.recovery.adapter_files import export_adapter
from sparsefit.recovery.dora_magnitudes import magnitudes_follow
from sparsefit.recovery.export import WEIGHTS_FILE, export_base


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the bare model, by name."""
    return {
        f"{name}.{key}".lstrip("."): tensor
        for name, module in base_modules(model).items()
        for key, tensor in module.named_parameters(recurse=False)
    }


@dataclass
class Findings:
    """Results of one tuner.

    Attributes:
        changes_base: Whether weights of the base were changed by creating the adapter.
        takes_from_base: Whether creating the adapter on other weights gives another adapter.
        without: The largest difference of a logit between the model in memory and the one that PEFT saves and loads; or
            an error.
        reload: The same with the package's rules; None if the package refuses the model.
        unchanged: For a refused model: whether it equals, bit for bit, the model before the attempt.
        fits: Whether the file has masks of the same weights that are pruned without an adapter.
        filled: How many of the pruned weights are not zero after PEFT's merge.
        pruned: How many weights are pruned.
        error: Why an adapter could not be created or merged, or why the model was refused.
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
    """Create, train, prune, save and load one adapter, with and without the package's rules."""
    found = Findings()
    try:
        adapted = case.make(dense_model(case.model)).eval()
    except Exception as error:  # the table reports it
        found.error = f"{type(error).__name__}: {error}"
        return found
    before = base_weights(dense_model(case.model))
    found.changes_base = any(not torch.equal(before[k], w) for k, w in base_weights(adapted).items() if k in before)
    found.takes_from_base = takes_from_base(case)
    found.without = without_rules(case)
    by_the_rules(case, adapted, found)
    return found


def by_the_rules(case: Case, adapted: nn.Module, found: Findings) -> None:
    """Train, prune, save and load an adapter with the package's rules."""
    train(adapted)
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    try:
        masks = pruned(adapted, case)
    except ConfigError as refusal:
        found.error = str(refusal)
        found.unchanged = all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())
        return
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base"), Path(folder, "adapter")
        exported = export_base(adapted, masks, base)
        export_adapter(adapted, masks, base, adapter)
        found.reload = difference(adapted, read(case, base, adapter), case)
        bare = read(case, base)
        found.fits = set(exported) == set(pruned(dense_model(case.model), case)) or case.model == "mha"
        exported.verify(bare)
    count_filled(adapted, exported, found)


def takes_from_base(case: Case) -> bool:
    """Whether adapters that are created with the same seed on two bases differ."""
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
    """The largest difference of a logit if PEFT alone saves and loads the adapter."""
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
    except Exception as error:  # the table reports it
        return type(error).__name__
    finally:
        targets.CHECKS[:] = checks


@torch.no_grad()
def train(adapted: nn.Module) -> None:
    """Randomize trained parameters, as training would."""
    torch.manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(0.05 * torch.randn_like(parameter))


def pruned(model: nn.Module, case: Case) -> MaskSet:
    """Prune a model, or the base of an adapter."""
    batches = [inputs(model, case.model, seed) for seed in (2, 3)]
    update = "none" if case.name in IN_ONE_PASS else "block"
    with magnitudes_follow(model):
        return prune(model, batches, PruningConfig(sparsity=0.5, update=update)).masks


def read(case: Case, base: Path, adapter: Path | None = None) -> nn.Module:
    """Load the files with plain transformers and PEFT."""
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
    """Merge with PEFT, and count the pruned weights that are not zero afterwards."""
    found.pruned = sum(zeros for _, zeros in masks.counts().values())
    try:
        whole = copy.deepcopy(adapted).merge_and_unload()
    except (NotImplementedError, AttributeError) as error:
        found.error = f"{type(error).__name__}: {error}"
        return
    found.filled = sum(masks.alive(whole).values())


def row(case: Case, found: Findings) -> str:
    """A line of the table."""
    if found.without is None:
        return f"| {case.name} | could not be created here: {found.error.splitlines()[0][:60]} | | | | |"
    without = found.without if isinstance(found.without, str) else f"{found.without:.2g}" if found.without else "0.0"
    here = "refused" if found.reload is None else str(found.reload)
    if found.unchanged is False or found.fits is False:
        here += " (!)"
    merge = (
        "" if found.reload is None else "no merge" if found.filled is None else f"{found.filled:,} of {found.pruned:,}"
    )
    yes = {True: "yes", False: ""}
    return f"| {case.name} | {yes[found.changes_base]} | {yes[found.takes_from_base]} | {without} | {here} | {merge} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuners", nargs="*", help="names of tuners; all by default")
    only = [name.lower() for name in parser.parse_args().tuners]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(
        "| tuner | changes its base | depends on base values | reload by PEFT alone | reload here "
        "| zeros that merging fills |"
    )
    print("|---|---|---|---|---|---|")
    for case in cases():
        if not only or case.tuner.lower() in only:
            print(row(case, measure(case)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
