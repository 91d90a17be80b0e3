"""`sparsefit merge RUN`: the recovered model in one piece, exactly sparse, and what merging changed."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsefit.callbacks.run_folder import RunFolder, replacing
from sparsefit.cli.quiet import quieten
from sparsefit.errors import MaskError, RunFolderError, SparsefitError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapter_files import load_adapter, read_notes
from sparsefit.recovery.inspection import MASKS_FILE, files_digest, inspect_folder
from sparsefit.recovery.merge import check_mergeable, merge
from sparsefit.reporting.console import console, stage_progress, summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_run(arguments: list[str]) -> int:
    """Merge the adapter of a run into its base, measure both and count the zeros; 1 if a mask does not hold."""
    parser = argparse.ArgumentParser(
        "sparsefit merge",
        description="Merge the adapter of a run into its sparse base: a model in Hugging Face layout with exactly the "
        "zeros of the run's masks.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--output", type=Path, help="the folder to write, new or empty; by default RUN/model")
    parser.add_argument(
        "--reapply-masks",
        action="store_true",
        help="merge an adapter that brings pruned weights back, too, and set them to zero again: another model, whose "
        "perplexity is shown beside that of the one that was trained",
    )
    parser.add_argument("--no-evaluation", action="store_true", help="do not measure perplexity before and after")
    given = parser.parse_args(arguments)
    quieten()
    folder = RunFolder(given.run)
    if given.output is None and folder.model.is_dir() and not given.reapply_masks:
        console.print(f"{folder.model} holds the recovered model already.", markup=False)
        return _counted(folder.model)
    output = (given.output or (folder.path / "merged" if given.reapply_masks else folder.model)).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunFolderError(f"{output} exists and is not empty. Give --output another folder")
    _merge(folder, output, given.reapply_masks, evaluate=not given.no_evaluation)
    return _counted(output)


def _merge(folder: RunFolder, output: Path, reapply_masks: bool, evaluate: bool) -> None:
    from sparsefit.modules.loading import load_tokenizer

    masks = _masks_of(folder)
    model, base = _recovered_model(folder, masks)
    check_mergeable(model, masks, reapply_masks)
    batches, why = _test_batches(folder) if evaluate else ([], "not asked for")
    first = batches[:1]
    before, logits = _perplexity(model, batches, "with the adapter apart"), _logits(model, first)
    merged: PreTrainedModel = merge(model, masks, reapply_masks)
    with replacing(output) as partial:
        merged.save_pretrained(partial)
        load_tokenizer(str(base)).save_pretrained(partial)
        masks.save(partial / MASKS_FILE)
    console.print(f"merged model: {output}", markup=False, soft_wrap=True)
    if not batches:
        console.print(f"perplexity: not measured ({why})", markup=False, soft_wrap=True)
        return
    after = _perplexity(merged, batches, "merged")
    away = max(float((a - b).abs().max()) for a, b in zip(logits, _logits(merged, first), strict=True))
    console.print(
        f"perplexity: {before:.4f} with the adapter apart, {after:.4f} merged ({after - before:+.4f}); "
        f"largest difference of a logit in one batch: {away:.2g}",
        soft_wrap=True,
    )


def _masks_of(folder: RunFolder) -> MaskSet:
    if not folder.path.is_dir():
        raise RunFolderError(f"there is no run folder {folder.path}")
    if not folder.adapter.is_dir():
        raise RunFolderError(
            f"the run in {folder.path} has no adapter to merge: {folder.adapter} is not there. Where nothing was "
            f"trained, {folder.base} is the pruned model; where all of it was, {folder.model} is the recovered one"
        )
    return MaskSet.load(folder.masks)


def _recovered_model(folder: RunFolder, masks: MaskSet) -> tuple[torch.nn.Module, Path]:
    """The model that was trained, on the CPU, and the folder of its base."""
    from sparsefit.modules.loading import load_causal_lm
    from sparsefit.recovery.quantize import dequantize_base, quantize_base

    notes = read_notes(folder.adapter)
    base = folder.path / notes.get("base", folder.base.name)
    if not base.is_dir():
        raise RunFolderError(
            f"the base of the adapter in {folder.adapter} is not at {base}: it was moved or deleted. Put it back there"
        )
    if notes.get("base_digest") not in (None, files_digest(base)):
        raise RunFolderError(
            f"the adapter in {folder.adapter} was trained on another base than {base}: the weights differ. Use the "
            "base of the run that it is from"
        )
    model = load_causal_lm(str(base), dtype="auto")
    if quantization := notes.get("quantization"):
        # The adapter was trained on these values; quantizing the same floats gives the same ones again.
        masks.verify(model)
        model.requires_grad_(False)
        quantize_base(model, quantization["kind"], masks, double_quant=quantization["double_quant"])
        dequantize_base(model)
    try:
        return load_adapter(model, folder.adapter, masks), base
    except MaskError as error:
        raise MaskError(f"{base} and {folder.masks} do not fit the adapter of the run: {error}") from error


def _test_batches(folder: RunFolder) -> tuple[list[Any], str]:
    """The test data of the run's recipe, or why there are none."""
    import yaml
    from lightning.pytorch.cli import instantiate_class

    if not folder.configuration.is_file():
        return [], f"there is no recipe {folder.configuration}"
    recipe = yaml.safe_load(folder.configuration.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or not recipe.get("data"):
        return [], "the recipe has no data"
    try:
        data = instantiate_class((), recipe["data"])
        data.setup("test")
        return list(data.test_dataloader()), ""
    except SparsefitError as error:
        return [], str(error)


def _perplexity(model: torch.nn.Module, batches: list[Any], what: str) -> float:
    from sparsefit.evaluation.perplexity import perplexity

    if not batches:
        return float("nan")
    with stage_progress(f"evaluating {what}", len(batches)) as advance:
        return perplexity(model, batches, lambda _: advance())


@torch.no_grad()
def _logits(model: torch.nn.Module, batches: Iterable[Any]) -> list[torch.Tensor]:
    from sparsefit.evaluation.perplexity import model_inputs

    model.eval()
    return [model(**model_inputs(batch)).logits.float() for batch in batches]


def _counted(folder: Path) -> int:
    inspection = inspect_folder(folder)
    status = f"counted on {', '.join(str(file) for file in inspection.files)}"
    console.print(summary({"name": str(folder), "status": status, "sparsity": inspection.account()}))
    for name, count in inspection.broken.items():
        console.print(f"{name}: {count} weights that its mask prunes are not zero", markup=False)
    return 1 if inspection.broken else 0
