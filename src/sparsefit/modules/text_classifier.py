"""LightningModules that train classifiers of texts and of tokens; they contain no pruning code."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from sparsefit.errors import ConfigError, DataError
from sparsefit.evaluation.perplexity import IGNORED
from sparsefit.modules.measured_module import Batch, MeasuredModule, check_loss, inputs_of, labels_of
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.settings import as_text, number


class _ClassifierModule(MeasuredModule):
    metrics: ClassVar[dict[str, str]] = {"accuracy": "higher", "f1": "higher"}
    """What `evaluate` measures, and whether higher or lower is better. f1 is the mean over classes."""
    kind: ClassVar[str]

    def __init__(
        self,
        model: str,
        adapter: AdapterSettings | None = None,
        distill: DistillSettings | None = None,
        num_labels: int | None = None,
        new_head: bool = False,
        label_smoothing: float = 0.0,
        **settings: Any,
    ) -> None:
        model = as_text(model)
        super().__init__(model, adapter, distill, **settings)
        number("label_smoothing", label_smoothing, least=0, below=1)
        if num_labels is not None:
            number("num_labels", num_labels, least=2, whole=True)
        if new_head and (num_labels is None or not isinstance(model, str)):
            raise ConfigError("new_head is for a model given by name, and needs num_labels")
        self.save_hyperparameters({"num_labels": num_labels, "new_head": new_head, "label_smoothing": label_smoothing})
        self.take_named(model, self.kind, num_labels, new_head)

    def take_model(self, base: nn.Module, new_modules: Any = ()) -> None:
        """As in `RecoverableModule`.

        Raises:
            ConfigError: for a head of another size than `num_labels`, or one that does not predict a single class.
        """
        config, wanted = base.config, self.hparams.num_labels
        self.classes: int = config.num_labels
        if wanted is not None and self.classes != wanted:
            raise ConfigError(
                f"the head of {self.hparams.model} has {self.classes} classes, and num_labels is {wanted}: leave "
                "num_labels out to keep this head, or set new_head=True to train a new one"
            )
        problem = getattr(config, "problem_type", None)
        if self.classes < 2 or problem in ("regression", "multi_label_classification"):
            raise ConfigError(
                f"{self.hparams.model} has {self.classes} label(s) and problem_type {problem}: {type(self).__name__} "
                "trains one class for each text or token. Train regression and multiple labels in a LightningModule "
                "of your own (sparsefit.modules.RecoveryMixin)"
            )
        super().take_model(base, new_modules)

    def setup(self, stage: str) -> None:
        """As in `RecoveryMixin`; also gives the classes of a new head the names in the data."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", None) if self.hparams.new_head else None
        if names is not None and len(names) == self.classes:
            self.model.config.id2label = dict(enumerate(names))
            self.model.config.label2id = {name: number for number, name in enumerate(names)}

    def new_figures(self) -> nn.ModuleDict:
        """Loss, accuracy and f1."""
        settings = {"num_classes": self.classes, "ignore_index": IGNORED, "validate_args": False}
        return nn.ModuleDict(
            {
                "loss": MeanMetric(),
                "accuracy": MulticlassAccuracy(average="micro", **settings),
                "f1": MulticlassF1Score(average="macro", **settings),
            }
        )

    def measure(self, figures: nn.ModuleDict, batch: Batch) -> None:
        """Adds a batch to the metrics.

        Raises:
            DataError: if labels do not fit the model.
        """
        logits = self.model(**inputs_of(batch)).logits.float().flatten(0, -2)  # (places, classes)
        labels = self._labels(batch).flatten()  # (places,)
        counted = labels != IGNORED
        if not bool(counted.any()):
            return
        figures["loss"].update(F.cross_entropy(logits[counted], labels[counted]), weight=counted.sum())
        for name in ("accuracy", "f1"):
            figures[name].update(logits[counted], labels[counted])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean cross entropy, logged as train_loss. If there is a teacher, it is mixed with the divergence from the
        teacher, logged as train_divergence.

        Raises:
            DataError: if labels do not fit the model.
            SparsefitError: if the loss is NaN.
        """
        labels, inputs = self._labels(batch), inputs_of(batch)
        taught = self.taught(self.model, **inputs)
        logits = self.model(**inputs).logits
        smoothing = self.hparams.label_smoothing
        loss = F.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing
        )
        check_loss(loss, batch_idx)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return self.distilled(loss, logits, taught.logits if taught is not None else None, labels != IGNORED)

    def _labels(self, batch: Batch) -> Tensor:
        labels = labels_of(batch)
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self.classes))]
        if labels.is_floating_point() or wrong.numel():
            told = f"the label {wrong.flatten()[0].item()}" if wrong.numel() else f"labels of {labels.dtype}"
            raise DataError(
                f"a batch has {told}, and the model's head has {self.classes} classes, 0 to {self.classes - 1}: give "
                "whole numbers of classes, or a model with a head of more (new_head=True and num_labels)"
            )
        return labels.long()


class SequenceClassifierModule(_ClassifierModule):
    """Training of a transformers model that classifies texts: all of it, its kept weights, or adapters on it.

    Batches are mappings: the model's inputs, and "labels" (batch,).

    Args:
        model: a folder or a hub name; in Python also a model.
        adapter: what is trained while the rest is frozen; None trains all of the model. The head is trained and saved
            with PEFT's adapters in any case.
        distill: learn also from the model as it was when the fit began (dense, if the fit prunes it), not only from
            the labels.
        num_labels: the number of classes of a new head; for an existing head, it is checked.
        new_head: put a new, untrained head on the named model.
        label_smoothing: share of each label that is spread over all classes in training, in [0, 1).
        **settings: of `RecoverableModule`: learning_rate, weight_decay, optimizer, dtype, gradient_checkpointing,
            attn_implementation.
    """

    kind: ClassVar[str] = "sequence_classification"


class TokenClassifierModule(_ClassifierModule):
    """Training of a transformers model that classifies tokens: all of it, its kept weights, or adapters on it.

    Batches are mappings: the model's inputs, and "labels" (batch, length), in which -100 is ignored.

    Args:
        model: a folder or a hub name; in Python also a model.
        **settings: as `SequenceClassifierModule` takes them.
    """

    kind: ClassVar[str] = "token_classification"
