"""Measures the cost of recovery in a training step: `WandaPruning` and masked LoRA, compared with plain LoRA of PEFT.

    python scripts/benchmarks/recovery.py --repeats 5 --threads 2
    python scripts/benchmarks/recovery.py --hidden 4096 --layers 8 --length 1024 --dtype bfloat16 --device cuda

Lightning's Trainer trains adapters of a Llama with random weights on the text of Python's manual:

- "lora": PEFT's LoRA on q and v, without this project's callbacks;
- "lora, pruned": the same with `WandaPruning`;
- "lora, all linears": PEFT's LoRA on all linear layers;
- "masked_lora": W + s M (.) (B A) on the same layers;
- "lora, 2": "lora" once more, which shows the noise of the measurement.

Every measurement runs in a separate process; the methods alternate. Prints the median seconds of a step (from its batch
to the end of its optimizer step) and the peak memory of the steps above the memory before training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from typing import Any

import torch
from common import EXACT_HEAP, PeakMemory, add_size_options, in_a_process, make_model, make_samples  # in this folder
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from sparsefit.callbacks import WandaPruning
from sparsefit.modules import CausalLMModule
from sparsefit.recovery.adapters import AdapterSettings

EVERYWHERE = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({"dropout": 0.0}, False),
    "lora, pruned": ({"dropout": 0.0}, True),
    "lora, 2": ({"dropout": 0.0}, False),
    "lora, all linears": ({"form": "lora", **EVERYWHERE}, True),
    "masked_lora": ({"form": "masked_lora", **EVERYWHERE}, True),
}
RATIOS = (("lora, 2", "lora"), ("lora, pruned", "lora"), ("masked_lora", "lora, all linears"))
WARM_UP = 2


class Clock(Callback):
    """Measures the seconds of each optimizer step, and the peak memory of all."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self.memory = PeakMemory(device)
        self._device = device

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure the memory that steps add to the model."""
        self.memory.__enter__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the step's start."""
        self._now()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:
        """Record the step's end."""
        self._now()
        self.seconds.append(time.perf_counter() - self._start)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the peak memory."""
        self.memory.__exit__()

    def _now(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train some steps in this process."""
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    settings, prunes = WAYS[name]
    module = CausalLMModule(make_model(args.hidden, args.layers, args.dtype), AdapterSettings(**settings))
    samples = [{"input_ids": sample[0]} for sample in make_samples(args.samples, args.length)]
    # The clock is the last callback, so that a step contains the work of the others.
    clock = Clock(args.device)
    callbacks = [*([WandaPruning(calibration_samples=2)] if prunes else []), clock]
    trainer = Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        max_steps=args.steps + WARM_UP,
        max_epochs=1000,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(samples, batch_size=args.batch_size))
    return {"seconds": clock.seconds[WARM_UP:], "peak": clock.memory.above}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, hidden=512, layers=4, samples=32, length=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps measured in each process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, {args.dtype}")
    print(f"width {args.hidden}, {args.layers} blocks, {args.batch_size} x {args.length} tokens a step")
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(args.repeats):
        for name in list(WAYS) if repeat % 2 == 0 else list(WAYS)[::-1]:
            seconds[name] += in_a_process(__file__, [*sys.argv[1:], f"--measure={name}"])["seconds"]
    peaks = {name: in_a_process(__file__, [*sys.argv[1:], f"--measure={name}"], EXACT_HEAP)["peak"] for name in WAYS}
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"\n{'':20} {'median ms':>10} {'fastest ms':>11} {'peak MB':>9}")
    for name, found in seconds.items():
        print(f"{name:20} {1e3 * medians[name]:10.1f} {1e3 * min(found):11.1f} {peaks[name] / 1e6:9.1f}")
    print()
    for one, other in RATIOS:
        fastest = min(seconds[one]) / min(seconds[other])
        print(
            f"{one} / {other}: time {medians[one] / medians[other]:.3f} (fastest {fastest:.3f}), "
            f"peak {peaks[one] / peaks[other]:.3f}"
        )


if __name__ == "__main__":
    main()
