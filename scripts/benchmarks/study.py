"""Measures the cost of a study with 2 scores x 2 granularities x 6 sparsities from one calibration.

    python scripts/benchmarks/study.py --threads 2
    python scripts/benchmarks/study.py --model runs/cifar10/convnext --train data/cifar10/train.parquet \\
        --test data/cifar10/test.parquet --samples 4096

Without `--model`, it uses a ConvNeXt with random weights (width 64 and 128) and scikit-learn's digits. In one process,
the study and the plain method (which calibrates for each point) alternate on the same points; their masks must be
equal. Prints the images that the model processed, seconds by kind of work, their shares, and the ratio of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsefit import prune
from sparsefit.cli.study_data import StudyData
from sparsefit.data import DigitsDataModule, ImageDataModule
from sparsefit.modules import ImageClassifierModule
from sparsefit.study import Grid, Results, Subject, study

GRID = Grid(["magnitude", "wanda"], ["output", "layer"], [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
UNTRAINED = {"num_channels": 1, "patch_size": 2, "num_stages": 2, "hidden_sizes": [64, 128], "depths": [2, 2]}


class ImageCounter:
    """Counts the images that go through a classifier.

    Attributes:
        seen: Number of images so far.
    """

    def __init__(self, module: nn.Module) -> None:
        self.seen = 0
        module.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen += len(args[0] if args else kwargs["pixel_values"])


def subject_of(args: argparse.Namespace) -> tuple[ImageClassifierModule, ImageDataModule]:
    """The model and its data, already read and decoded."""
    if args.model is None:
        module = ImageClassifierModule("convnext", UNTRAINED, num_classes=10)
        data = DigitsDataModule(calibration_samples=args.samples, evaluation_batch_size=450)
    else:
        module = ImageClassifierModule(args.model)
        sources = {"train_source": args.train, "test_source": args.test}
        data = ImageDataModule(args.model, **sources, calibration_samples=args.samples, evaluation_batch_size=500)
    for stage in ("fit", "test"):
        data.setup(stage)
    for loader in (data.calibration_dataloader(), data.test_dataloader()):
        for _ in loader:
            pass
    return module, data


def shared(module: ImageClassifierModule, data: ImageDataModule, counter: ImageCounter) -> dict[str, Any]:
    """Run the study: seconds by kind of work, images, and the digests of the masks."""
    before, start = counter.seen, time.perf_counter()
    subject = Subject("model", module, lambda batch: module.predict_step(batch, 0))
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder) / "results.csv", module.metrics)
        study(subject, StudyData(data, module, module.device, 0), GRID.points(), results)
    seconds = time.perf_counter() - start
    spent = {kind: sum(row[f"{kind}_seconds"] or 0 for row in results.rows) for kind in ("selection", "evaluation")}
    spent["calibration"] = subject.calibration["seconds"]
    spent["other"] = seconds - sum(spent.values())
    digests = [row["digest"] for row in results.rows if row["stage"] == "pruned"]
    return {"seconds": seconds, "by kind": spent, "images": counter.seen - before, "digests": digests}


def plain(module: ImageClassifierModule, data: ImageDataModule, counter: ImageCounter) -> dict[str, Any]:
    """Run each point separately: load the dense weights, calibrate, prune, evaluate."""
    dense = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before, start = counter.seen, time.perf_counter()
    module.evaluate(data.test_dataloader())
    digests = []
    for point in GRID.points():
        batches = data.calibration_dataloader() if point.config.needs_inputs else None
        result = prune(module, batches, point.config, forward=lambda batch: module.predict_step(batch, 0))
        digests.append(result.masks.digest())
        module.evaluate(data.test_dataloader())
        module.load_state_dict(dense)
    return {"seconds": time.perf_counter() - start, "images": counter.seen - before, "digests": digests}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in Hugging Face layout, with its image processor")
    parser.add_argument("--train", help="source of the images to calibrate on")
    parser.add_argument("--test", help="source of the images to evaluate on")
    parser.add_argument("--samples", type=int, default=512, help="calibration images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    module, data = subject_of(args)
    counter = ImageCounter(module)
    tested = sum(len(batch["labels"]) for batch in data.test_dataloader())
    points = len(GRID.points())
    rounds = [(shared(module, data, counter), plain(module, data, counter)) for _ in range(args.repeats)]
    for own, other in rounds:
        assert own["digests"] == other["digests"], "the masks differ"
        assert own["images"] == args.samples + (points + 1) * tested, (
            "more than one calibration, or more than one evaluation per point"
        )
    own, other = sorted(rounds, key=lambda pair: pair[0]["seconds"])[len(rounds) // 2]
    print(f"{points} points, {args.samples} calibration and {tested} test images, {args.threads} threads")
    for kind, seconds in own["by kind"].items():
        print(f"{kind:12} {seconds:8.2f} s  {seconds / own['seconds']:6.1%}")
    print(f"{'study':12} {own['seconds']:8.2f} s  {own['images']:,} images through the model")
    print(f"{'plain':12} {other['seconds']:8.2f} s  {other['images']:,} images")
    ratios = sorted(mine["seconds"] / others["seconds"] for mine, others in rounds)
    print(f"study / plain: {ratios[len(ratios) // 2]:.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
