"""A LightningModule that trains an image classifier; it contains no pruning code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from sparsefit.errors import ConfigError, SparsefitError
from sparsefit.evaluation.accuracy import (
    ImageBatch,
    accuracy,
    check_finite,
    checked_labels,
    image_logits,
    images_and_labels,
    images_of,
    top_accuracies,
)
from sparsefit.modules.image_models import check_head, head_size, new_image_classifier
from sparsefit.modules.loading import Dtype, find_image_processor, load_image_classifier, load_with_new_head
from sparsefit.modules.optimizers import build_optimizer, matrices_decay, trained_parameters
from sparsefit.modules.recoverable import RecoverableModule
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.settings import as_text, number

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

OptimizerName = Literal["adamw", "sgd", "adamw_8bit"]


class ImageClassifierModule(RecoverableModule):
    """Training of an image classifier by cross entropy: one of transformers, or any module that maps images to logits.

    Batches are {"pixel_values": (batch, channels, height, width), "labels": (batch,)}, also under the names "image(s)"
    and "label", or pairs (images, labels). Vectors (norms, biases, layer scales) have no weight decay, as is usual for
    these models.

    Attributes:
        model: the classifier, PEFT-wrapped if `adapter` is one of PEFT's.
        image_processor: the model's image processor, if it came with one; it is exported with the model.

    Args:
        model: A folder or a hub name; or, with `config`, the type of an architecture of transformers: "convnext",
            "convnextv2", "deit", "vit", "swin"; or a module that maps images to logits, such as one of timm or
            torchvision: in YAML its `class_path` (a class, or a function with an annotated return type), `init_args`,
            and `dict_kwargs` for its **kwargs.
        config: Settings of that architecture, to build an untrained model: hidden_sizes, image_size ....
        num_classes: The number of classes of a new model's head; for an existing head, it is checked.
        optimizer: "adamw", "sgd" with momentum, or "adamw_8bit": bitsandbytes' AdamW, which keeps its two moments in
            8 bits, except those of tensors below 4,096 weights.
        learning_rate: The learning rate; constant unless a callback changes it.
        weight_decay: The weight decay of matrices and kernels.
        momentum: The momentum of SGD.
        label_smoothing: Share of each label that is spread over all classes in training, in [0, 1).
        dtype: The weights' dtype; "auto" is the one they were saved in. A module given keeps its own.
        attn_implementation: transformers' attention: "sdpa", "eager", "flash_attention_2"; None is its choice. On a CPU
            "eager" trains faster on images of few patches.
        adapter: What is trained while the rest is frozen, such as {"target_modules": "all-linear"}; None trains all of
            the model.
        distill: Learn also from the model as it was when the fit began (dense, if the fit prunes it), not only from
            the labels.
        new_head: Put a new, untrained head of `num_classes` classes on the named model. It is trained and saved in
            addition to any adapter.

    Raises:
        ConfigError: for a model or a setting that cannot work.
    """

    optimizer_names: ClassVar[tuple[str, ...]] = ("adamw", "sgd", "adamw_8bit")
    metrics: ClassVar[dict[str, str]] = {"accuracy": "higher", "top5_accuracy": "higher"}
    """What `evaluate` measures, and whether higher or lower is better."""

    def __init__(
        self,
        model: str | nn.Module,
        config: dict[str, Any] | None = None,
        num_classes: int | None = None,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        label_smoothing: float = 0.0,
        dtype: Dtype = "float32",
        attn_implementation: str | None = None,
        adapter: AdapterSettings | None = None,
        distill: DistillSettings | None = None,
        new_head: bool = False,
    ) -> None:
        model = as_text(model)
        super().__init__(
            model, adapter, distill, learning_rate, weight_decay, optimizer, dtype, False, attn_implementation
        )
        number("momentum", momentum, least=0, below=1)
        number("label_smoothing", label_smoothing, least=0, below=1)
        if num_classes is not None:
            number("num_classes", num_classes, least=2, whole=True)
        if new_head and (num_classes is None or config is not None or not isinstance(model, str)):
            raise ConfigError("new_head is for a model given by name, without config, and needs num_classes")
        self.save_hyperparameters(
            {
                "model": model if isinstance(model, str) else _name_of(model),
                "config": config,
                "num_classes": num_classes,
                "momentum": momentum,
                "label_smoothing": label_smoothing,
                "new_head": new_head,
            }
        )
        self.image_processor: BaseImageProcessor | None = None
        base, new = self._make(model)
        self.classes = head_size(base) or num_classes  # None: taken from the first logits
        if num_classes is not None:
            check_head(self.classes, num_classes, self.hparams.model)
        self.take_model(base, new)
        self.losses = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})
        self.accuracies = nn.ModuleDict()
        if self.classes is not None:
            self._prepare_accuracies(self.classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width).

        Raises:
            DataError: if the model cannot take such images.
            ConfigError: if its number of classes is not `num_classes`, or it returns no logits.
        """
        logits = image_logits(self.model, pixel_values)
        if self.hparams.num_classes is not None:
            check_head(logits.shape[1], self.hparams.num_classes, self.hparams.model)
        return logits

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The mean cross entropy, logged as train_loss. If there is a teacher, it is mixed with the divergence from the
        teacher, logged as train_divergence.

        Raises:
            DataError: if labels or images do not fit the model.
            SparsefitError: if the loss is NaN.
        """
        images, labels = images_and_labels(batch)
        taught = self.taught(self.forward, images)
        logits = self(images)
        labels = checked_labels(labels, logits)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.hparams.label_smoothing)
        if bool(loss.isnan()):
            raise SparsefitError(
                f"the training loss of batch {batch_idx} is not a number: training has diverged, or the images or "
                "weights are damaged. Lower the learning rate, clip gradients, or train in bf16-mixed, not float16"
            )
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return self.distilled(loss, logits, taught)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Adds a batch to val_loss, val_accuracy and val_top5_accuracy."""
        self._add("val", batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs val_loss, val_accuracy and val_top5_accuracy."""
        self._log_figures("val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Adds a batch to test_loss, test_accuracy and test_top5_accuracy."""
        self._add("test", batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Logs test_loss, test_accuracy and test_top5_accuracy."""
        self._log_figures("test")

    def predict_step(self, batch: ImageBatch | Tensor, batch_idx: int = 0) -> Tensor:
        """Logits of the batch's images, which is also the calibration pass; labels are ignored."""
        return self(images_of(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the trained parameters, at a constant learning rate; vectors have no weight decay."""
        settings = self.hparams
        groups = matrices_decay(trained_parameters(self), settings.weight_decay)
        return build_optimizer(
            settings.optimizer, groups, settings.learning_rate, settings.weight_decay, settings.momentum
        )

    def evaluate(self, loader: Iterable[ImageBatch], progress: Callable[[int], None] | None = None) -> dict[str, float]:
        """{"accuracy": ..., "top5_accuracy": ...} of the loader's images, as shares; `progress` is called with the
        number of batches done. A head of fewer than five classes has a top-5 accuracy of 1."""
        return accuracy(self.model, loader, progress)

    def _make(self, model: str | nn.Module) -> tuple[nn.Module, list[str]]:
        """The model, and the paths of its newly initialized modules."""
        config, num_classes = self.hparams.config, self.hparams.num_classes
        dtype, attention = self.hparams.dtype, self.hparams.attn_implementation
        if isinstance(model, nn.Module):
            if config is not None:
                raise ConfigError(
                    "`config` is for a model that is built by its type: leave it out where a module is given"
                )
            return model, []
        if config is not None:
            size = {} if num_classes is None else {"num_labels": num_classes}
            return new_image_classifier(model, size | config, dtype, attention), []
        if self.hparams.new_head:
            loaded, new = load_with_new_head(model, "image_classification", num_classes, dtype, attention)
        else:
            loaded, new = load_image_classifier(model, dtype, attention), []
        self.image_processor = find_image_processor(model)
        return loaded, new

    def _prepare_accuracies(self, classes: int) -> None:
        self.classes = classes
        self.accuracies.update({stage: top_accuracies(classes) for stage in ("val", "test")})
        self.accuracies.to(self.device)

    def _add(self, stage: str, batch: ImageBatch, batch_idx: int) -> None:
        images, labels = images_and_labels(batch)
        logits = self(images)
        labels = checked_labels(labels, logits)
        check_finite(logits, f"batch {batch_idx + 1}")
        if not self.accuracies:
            self._prepare_accuracies(logits.shape[1])
        self.losses[stage].update(F.cross_entropy(logits.float(), labels), weight=len(labels))
        self.accuracies[stage].update(logits.float(), labels)

    def _log_figures(self, stage: str) -> None:
        if stage not in self.accuracies:  # no batch at all
            return
        figures = {"loss": self.losses[stage].compute(), **self.accuracies[stage].compute()}
        self.losses[stage].reset()
        self.accuracies[stage].reset()
        self.log_dict({f"{stage}_{name}": value for name, value in figures.items()}, prog_bar=True, sync_dist=False)


def _name_of(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return name or f"{type(model).__module__}.{type(model).__qualname__}"
