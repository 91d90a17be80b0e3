"""Train a small ConvNeXt or DeiT on CIFAR-10 from nothing, as a dense model to prune.

    python scripts/train_cifar10.py --model convnext --minutes 30 --output runs/cifar10/convnext
    python scripts/train_cifar10.py --model deit --minutes 30 --output runs/cifar10/deit

Reads `train.parquet` and `test.parquet` (images as bytes, with labels) from the folder `--data`. The last 5,000 images
of the training file are held out for validation; the test file is looked at once, at the end. Training runs until
`--minutes` are spent or `--epochs` are done, and the learning rate, after its warm-up, falls linearly to zero there.
The output is a folder in Hugging Face layout: model, configuration, image processor, and `training.json`, which tells
the accuracies and what they cost. Give the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from kornia.augmentation import RandomCrop, RandomHorizontalFlip
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from transformers import ViTImageProcessorPil

from sparsefit.callbacks import AtomicCheckpointIO, GPUHourBudget
from sparsefit.data import ImageDataModule
from sparsefit.modules import ImageClassifierModule
from sparsefit.reporting.machine import machine, versions

SIDE = 32
HELD_OUT_FROM = 45_000
CHECKPOINT_INTERVAL = timedelta(minutes=3)

# Sized for one CPU core: most accuracy in half an hour of those tried. Layer scales of 1 and not of 1e-6: a short
# training does not wake up blocks that begin as nothing.
MODELS: dict[str, dict[str, Any]] = {
    "convnext": {
        "image_size": SIDE,
        "patch_size": 2,
        "num_stages": 3,
        "hidden_sizes": [32, 96, 256],
        "depths": [1, 2, 2],
        "layer_scale_init_value": 1.0,
    },
    "deit": {
        "image_size": SIDE,
        "patch_size": 4,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 384,
    },
}
RATES = {"convnext": 4e-3, "deit": 1e-3}

# Channel means and deviations of the training images; no cropping, as ConvNeXt's own processor does below 384 pixels.
PROCESSOR = {
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.4914, 0.4822, 0.4465],
    "image_std": [0.2470, 0.2435, 0.2616],
}


def data_module(args: argparse.Namespace) -> ImageDataModule:
    """CIFAR-10 with flips and padded random crops."""
    train = args.data / "train.parquet"
    return ImageDataModule(
        processor=str(args.output),
        train_source=f"{train}[:{HELD_OUT_FROM}]",
        val_source=f"{train}[{HELD_OUT_FROM}:]",
        test_source=str(args.data / "test.parquet"),
        batch_size=args.batch_size,
        evaluation_batch_size=500,
        augmentation=[RandomHorizontalFlip(), RandomCrop((SIDE, SIDE), padding=4)],
        seed=args.seed,
        num_workers=args.workers,
    )


def tell(trainer: Trainer, module: ImageClassifierModule) -> None:
    """Print where a training stands."""
    if trainer.state.fn == "fit" and not trainer.sanity_checking:
        figures = {name: f"{value:.4f}" for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        print(f"step {trainer.global_step}: {figures}", flush=True)


def train(args: argparse.Namespace, checkpoints: Path) -> dict[str, Any]:
    """Train, or go on with a training; writes the model and returns the account of it."""
    module = ImageClassifierModule(
        args.model,
        MODELS[args.model],
        num_classes=10,
        learning_rate=args.learning_rate or RATES[args.model],
        weight_decay=args.weight_decay,
        label_smoothing=0.1,
        attn_implementation="eager" if args.model == "deit" else None,  # the faster one on a CPU, for so few patches
    )
    data = data_module(args)
    budget = GPUHourBudget(args.minutes / 60, warmup_steps=args.warmup_steps, reserve=0.0)
    keep = ModelCheckpoint(
        checkpoints, "timed", save_last=True, train_time_interval=CHECKPOINT_INTERVAL, save_on_exception=True
    )
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=args.precision,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        callbacks=[budget, keep, LambdaCallback(on_validation_end=tell)],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    last = checkpoints / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    steps, epochs, seconds = trainer.global_step, trainer.current_epoch, dict(budget.ledger.seconds)
    (validated,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    module.model.save_pretrained(args.output)
    return {
        "validation": {key.removeprefix("val_"): value for key, value in validated.items()},
        "test": {key.removeprefix("test_"): value for key, value in tested.items()},
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "steps": steps,
        "epochs": epochs,
        "images": steps * args.batch_size,
        "seconds": seconds,
    }


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="convnext")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="folder of train.parquet, test.parquet")
    parser.add_argument("--minutes", type=float, default=30, help="wall time of the training, validation included")
    parser.add_argument("--epochs", type=int, default=-1, help="at most so many; without it, only the minutes count")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, help=f"peak; by default {RATES}")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--precision", default="bf16-mixed", help="bf16-mixed (twice as fast where the CPU has it), 32")
    parser.add_argument("--threads", type=int, help="of torch; by default all cores")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.output / "training.json").exists():
        parser.error(f"{args.output} holds a trained model: choose another folder, or move it away")

    if args.threads:
        torch.set_num_threads(args.threads)
    seed_everything(args.seed, verbose=False)
    ViTImageProcessorPil(**PROCESSOR).save_pretrained(args.output)
    checkpoints = args.output / "checkpoints"
    account = {"command": shlex.join(["python", *sys.argv]), "threads": torch.get_num_threads()}
    account |= train(args, checkpoints) | {"machine": machine(), "versions": versions()}
    (args.output / "training.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(checkpoints)  # of what is now done
    print(
        json.dumps({key: account[key] for key in ("validation", "test", "parameters", "epochs", "seconds")}, indent=2)
    )


if __name__ == "__main__":
    main()
