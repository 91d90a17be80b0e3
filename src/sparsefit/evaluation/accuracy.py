"""Top-1 and top-5 accuracy of an image classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from sparsefit.errors import ConfigError, DataError, SparsefitError
from sparsefit.evaluation.perplexity import evaluation_mode

ImageBatch: TypeAlias = Mapping[str, Any] | Sequence[Any]

IMAGE_KEYS = ("pixel_values", "images", "image")
LABEL_KEYS = ("labels", "label")
_ONE_SIZE = ("deit", "vit")  # their position embeddings are for one number of patches


@torch.no_grad()
def accuracy(
    model: nn.Module, batches: Iterable[ImageBatch], progress: Callable[[int], None] | None = None
) -> dict[str, float]:
    """The share of images whose label has the highest logit, or one of the five highest.

    The model is evaluated in evaluation mode; afterwards each module is back in its previous mode. A head of fewer than
    five classes has a top-5 accuracy of 1.

    Args:
        model: an image classifier of transformers, or a module that maps images to logits; batches move to its device.
        batches: mappings with "pixel_values" (batch, channels, height, width) and "labels" (batch,), or "image(s)" and
            "label"; or pairs (images, labels).
        progress: called with the number of batches done, after each of them.

    Returns:
        {"accuracy": ..., "top5_accuracy": ...}, each in [0, 1].

    Raises:
        DataError: if there is no image, or labels or images do not fit the model.
        SparsefitError: if logits are not finite.
    """
    device = next(model.parameters()).device
    metrics: MetricCollection | None = None
    with evaluation_mode(model):
        for number, batch in enumerate(batches, 1):
            images, labels = (part.to(device) for part in images_and_labels(batch))
            logits = image_logits(model, images)
            labels = checked_labels(labels, logits)
            check_finite(logits, f"batch {number}")
            if metrics is None:
                metrics = top_accuracies(logits.shape[1]).to(device)
            metrics.update(logits.float(), labels)
            if progress is not None:
                progress(number)
    if metrics is None:
        raise DataError("there are no images to evaluate on: the data give no batch")
    return {name: float(value) for name, value in metrics.compute().items()}


def top_accuracies(classes: int) -> MetricCollection:
    """Metrics of (logits, labels) over all images: accuracy, and top5_accuracy (top-k with k = min(5, classes)).

    Raises:
        ConfigError: for fewer than two classes.
    """
    if classes < 2:
        raise ConfigError(f"the model's head has {classes} class(es): accuracy needs at least 2")
    settings = {"num_classes": classes, "average": "micro", "validate_args": False}
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(**settings),
            "top5_accuracy": MulticlassAccuracy(top_k=min(5, classes), **settings),
        }
    )


def images_of(batch: ImageBatch | Tensor) -> Tensor:
    """The images of a batch with or without labels: (batch, channels, height, width)."""
    if isinstance(batch, Tensor):
        return batch
    return _part(batch, IMAGE_KEYS, 0, "images")


def images_and_labels(batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """The images and the labels of a batch.

    Raises:
        DataError: if it lacks one of them.
    """
    return images_of(batch), _part(batch, LABEL_KEYS, 1, "labels")


def image_logits(model: nn.Module, images: Tensor) -> Tensor:
    """A model's logits for images: (batch, classes).

    Args:
        model: an image classifier of transformers, or a module that maps images to logits; images are converted to the
            dtype of its weights.
        images: (batch, channels, height, width), floating point.

    Raises:
        DataError: if the model cannot take such images by its configuration, or fails on images of another size.
        ConfigError: if it returns anything but logits.
    """
    check_images(images, getattr(model, "config", None))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    with _fitting(model, images):
        output = model(images.to(dtype))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ConfigError(
            f"{type(model).__name__} gives {got} for {len(images)} images, and no logits (batch, classes): give an "
            "image classifier, or a module that returns such a tensor"
        )
    return logits


def check_images(images: Tensor, config: Any = None) -> None:
    """Check that a model with this transformers configuration can take the images.

    Raises:
        DataError: for images that are not a batch of floats, have another number of channels, or another size although
            the model only takes one size.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"the images are a tensor {tuple(images.shape)} of {images.dtype}; a model takes floats of the shape "
            "(batch, channels, height, width): scale and normalise them, as the model's image processor does"
        )
    _, channels, *size = images.shape
    wanted = getattr(config, "num_channels", None)
    if wanted is not None and channels != wanted:
        raise DataError(
            f"the images have {channels} channel(s) and the model takes {wanted}: convert them ('RGB' has 3), or give "
            f"a model whose config has num_channels={channels}"
        )
    side = getattr(config, "image_size", None)
    if side is None or getattr(config, "model_type", None) not in _ONE_SIZE:
        return
    wanted_size = [side, side] if isinstance(side, int) else list(side)
    if size != wanted_size:
        raise DataError(
            f"the images are {size[0]}x{size[1]} and the model takes {wanted_size[0]}x{wanted_size[1]}: resize them "
            "(the image processor's size), or give a model whose config has that image_size"
        )


@contextmanager
def _fitting(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Turns a model's error for images of another size than its own into a DataError that names both sizes."""
    side = getattr(getattr(model, "config", None), "image_size", None)
    try:
        yield
    except (SparsefitError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError) as error:
        size = [side, side] if isinstance(side, int) else list(side or images.shape[2:])
        if size == list(images.shape[2:]):
            raise
        raise DataError(
            f"{type(model).__name__} fails on images {tuple(images.shape)}, and its config has image_size={side}: "
            f"{' '.join(str(error).split()).rstrip('.')}. Resize the images (the image processor's size), or give a "
            "model whose config has their size"
        ) from error


def checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """The labels as int64, after checking that they are classes of the head.

    Args:
        labels: (batch,), of an integer type.
        logits: (batch, classes).

    Raises:
        DataError: if they are not; names a wrong label, the number of classes and the way out.
    """
    count, classes = logits.shape
    if labels.shape != (count,) or labels.is_floating_point():
        raise DataError(
            f"the labels are a tensor {tuple(labels.shape)} of {labels.dtype} for {count} images: give one whole "
            "number, the class, for each image"
        )
    labels = labels.long()
    low, high = (int(label) for label in labels.aminmax()) if count else (0, 0)
    if low < 0:
        raise DataError(
            f"an image has the label {low}; labels are from 0 to {classes - 1}. A negative label marks images without "
            "one, as test data often have: leave them out, or take another split"
        )
    if high >= classes:
        raise DataError(
            f"an image has the label {high}, and the model's head has {classes} classes, 0 to {classes - 1}: give a "
            f"model with a head of at least {high + 1} classes (num_labels in its config), or other data"
        )
    return labels


def check_finite(logits: Tensor, what: str) -> None:
    """Check that logits are finite.

    Raises:
        SparsefitError: if one is not; `what` names the batch.
    """
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).any(dim=1).sum())
        raise SparsefitError(
            f"the logits of {bad} of {len(logits)} images of {what} are not finite. The model's weights or the images "
            "may be damaged, or float16 too narrow for it: evaluate in bfloat16 or float32"
        )


def _part(batch: ImageBatch, keys: tuple[str, ...], place: int, what: str) -> Tensor:
    if isinstance(batch, Mapping):
        part = next((batch[key] for key in keys if key in batch), None)
        held = f"a mapping with {', '.join(map(repr, batch))}"
    else:
        part = batch[place] if isinstance(batch, Sequence) and len(batch) > place else None
        held = f"a {type(batch).__name__}"
    if not isinstance(part, Tensor):
        raise DataError(
            f"a batch has no {what}: it is {held}. Give mappings with {' or '.join(map(repr, keys))}, or pairs "
            "(images, labels)"
        )
    return part
