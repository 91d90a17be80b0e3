"""Train a small ResNet, ConvNeXt or DeiT on CIFAR-10 from scratch, as a dense model to prune.

    python scripts/train_cifar10.py --model resnet --minutes 35 --output runs/cifar10/resnet
    python scripts/train_cifar10.py --model convnext --minutes 30 --output runs/cifar10/convnext
    python scripts/train_cifar10.py --model deit --minutes 30 --output runs/cifar10/deit

Reads `train.parquet` and `test.parquet` (images as bytes, with labels) from the folder `--data`. The last 5,000 images
of the training file are held out for validation; the test file is used once, at the end. Training runs until
`--minutes` are spent or `--epochs` are done, and the learning rate, after its warm-up, falls linearly to zero there.
The output is a folder in Hugging Face layout: model, configuration, image processor, and `training.json` with
the accuracies and their cost. Run the same command again to resume after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from kornia.augmentation import RandomCrop, RandomHorizontalFlip
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import ViTImageProcessorPil

from sparsefit.callbacks import AtomicCheckpointIO, GPUHourBudget
from sparsefit.data import ImageDataModule
from sparsefit.machine import machine, versions
from sparsefit.modules import ImageClassifierModule

HELD_OUT_FROM = 45_000
CHECKPOINT_INTERVAL = timedelta(minutes=3)
REPORTED_STEPS = 100


@dataclass(frozen=True)
class Recipe:
    """An architecture and how it is trained.

    Attributes:
        config: Of the architecture, for transformers.
        side: Of the images that it takes, in pixels.
        optimizer: Its name in `ImageClassifierModule`.
        learning_rate: The highest.
        weight_decay: Of matrices and kernels.
        clip: The largest norm of a gradient; None clips nothing.
    """

    config: dict[str, Any]
    side: int = 32
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    clip: float | None = 1.0


# Sized for one CPU core: most accuracy in half an hour of those tried. Layer scales of 1 and not of 1e-6: a short
# training does not wake up blocks that begin as nothing. The ResNet's stem (7x7, stride 2, then pooling) is made for
# large images: it takes them at twice their size, so that its blocks begin at 16x16 positions.
RECIPES = {
    "resnet": Recipe(
        {"embedding_size": 32, "hidden_sizes": [48, 96, 192], "depths": [1, 1, 1], "layer_type": "basic"},
        side=64,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=5e-4,
        clip=None,
    ),
    "convnext": Recipe(
        {
            "image_size": 32,
            "patch_size": 2,
            "num_stages": 3,
            "hidden_sizes": [32, 96, 256],
            "depths": [1, 2, 2],
            "layer_scale_init_value": 1.0,
        },
        learning_rate=4e-3,
    ),
    "deit": Recipe(
        {
            "image_size": 32,
            "patch_size": 4,
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 384,
        }
    ),
}

# Of the training images. No cropping, as ConvNeXt's own processor does below 384 pixels.
MEAN, DEVIATION = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def data_module(args: argparse.Namespace) -> ImageDataModule:
    """CIFAR-10 with flips and padded random crops."""
    train, side = args.data / "train.parquet", RECIPES[args.model].side
    return ImageDataModule(
        processor=str(args.output),
        train_source=f"{train}[:{HELD_OUT_FROM}]",
        val_source=f"{train}[{HELD_OUT_FROM}:]",
        test_source=str(args.data / "test.parquet"),
        batch_size=args.batch_size,
        evaluation_batch_size=500,
        augmentation=[RandomHorizontalFlip(), RandomCrop((side, side), padding=side // 8)],
        seed=args.seed,
        num_workers=args.workers,
    )


class Progress(Callback):
    """Prints where a training stands: every so many steps with an estimate of what is left, and each validation."""

    def __init__(self, minutes: float, batch_size: int, budget: GPUHourBudget) -> None:
        self.minutes, self.batch_size, self.budget = minutes, batch_size, budget
        self._last = (0, time.monotonic())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure the pace."""
        self._last = (trainer.global_step, time.monotonic())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line."""
        step, now = trainer.global_step, time.monotonic()
        if step % REPORTED_STEPS:
            return
        pace = (step - self._last[0]) / (now - self._last[1])
        self._last = (step, now)
        of_steps = (trainer.estimated_stepping_batches - step) / pace / 60
        left = min(self.minutes - 60 * self.budget.ledger.hours, of_steps)
        figures = f"loss {trainer.callback_metrics['train_loss']:.3f}, {pace * self.batch_size:.0f} images/s"
        print(
            f"step {step}, epoch {step / trainer.num_training_batches:.2f}: {figures}, {left:.1f} minutes left",
            flush=True,
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the figures of a validation within the training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            figures = [f"{name} {value:.4f}" for name, value in trainer.callback_metrics.items() if "val_" in name]
            print(f"step {trainer.global_step}: {', '.join(figures)}", flush=True)


def train(args: argparse.Namespace, checkpoints: Path) -> dict[str, Any]:
    """Train, or go on with a training; writes the model and returns the account of it."""
    recipe = RECIPES[args.model]
    module = ImageClassifierModule(
        args.model,
        recipe.config,
        num_classes=10,
        optimizer=recipe.optimizer,
        learning_rate=args.learning_rate or recipe.learning_rate,
        weight_decay=recipe.weight_decay if args.weight_decay is None else args.weight_decay,
        label_smoothing=0.1,
        attn_implementation="eager" if args.model == "deit" else None,  # the faster one on a CPU, for so few patches
    ).to(memory_format=torch.channels_last)  # in which convolutions are faster
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
        gradient_clip_val=recipe.clip,
        check_val_every_n_epoch=args.validate_every,
        callbacks=[budget, keep, Progress(args.minutes, args.batch_size, budget)],
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
    parser.add_argument("--model", choices=RECIPES, default="resnet")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="folder of train.parquet, test.parquet")
    parser.add_argument("--minutes", type=float, default=30, help="wall time of the training, validation included")
    parser.add_argument(
        "--epochs", type=int, default=-1, help="the most epochs; by default only --minutes is the limit"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--validate-every", type=int, default=1, help="epochs between two validations")
    parser.add_argument("--learning-rate", type=float, help="the highest; by default that of the model's recipe")
    parser.add_argument("--weight-decay", type=float, help="by default that of the model's recipe")
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
    side = RECIPES[args.model].side
    processor = ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=MEAN, image_std=DEVIATION)
    processor.save_pretrained(args.output)
    checkpoints = args.output / "checkpoints"
    account = {"command": shlex.join(["python", *sys.argv]), "threads": torch.get_num_threads()}
    account |= train(args, checkpoints) | {"machine": machine(), "versions": versions()}
    (args.output / "training.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(checkpoints)  # training is complete
    print(
        json.dumps({key: account[key] for key in ("validation", "test", "parameters", "epochs", "seconds")}, indent=2)
    )


if __name__ == "__main__":
    main()
