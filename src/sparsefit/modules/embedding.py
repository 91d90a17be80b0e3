"""A LightningModule that trains a text embedding model; it contains no pruning code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from sparsefit.errors import DataError
from sparsefit.modules.loading import find_tokenizer, load_body
from sparsefit.modules.measured_module import Batch, MeasuredModule, check_loss, inputs_of, labels_of
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.settings import as_text


class EmbeddingModule(MeasuredModule):
    """Training of a transformers encoder whose embedding of a text is the mean over its real tokens.

    Batches are mappings: the model's inputs for pairs of texts (batch, 2, length), and "labels" (batch,), how similar
    they are. The loss is the squared difference of the label and the cosine of the two embeddings. Distillation
    compares the directions of the teacher's and the student's embeddings; with a weight of 1 no labels are needed.

    Args:
        model: a folder or a hub name; in Python also a model.
        adapter: what is trained while the rest is frozen; None trains all of the model.
        distill: learn also from the model as it was when the fit began (dense, if the fit prunes it), not only from
            the labels.
        drop_head: take only the body of a model with a head, such as a masked language model.
        **settings: of `RecoverableModule`: learning_rate, weight_decay, optimizer, dtype, gradient_checkpointing,
            attn_implementation.
    """

    metrics: ClassVar[dict[str, str]] = {"spearman": "higher", "pearson": "higher"}
    """What `evaluate` measures (the correlations of cosines and labels), and whether higher or lower is better."""

    def __init__(
        self,
        model: str,
        adapter: AdapterSettings | None = None,
        distill: DistillSettings | None = None,
        drop_head: bool = False,
        **settings: Any,
    ) -> None:
        model = as_text(model)
        super().__init__(model, adapter, distill, **settings)
        self.save_hyperparameters({"drop_head": drop_head})
        if drop_head and isinstance(model, str):
            self.take_model(load_body(model, self.hparams.dtype, self.hparams.attn_implementation))
            self.tokenizer = find_tokenizer(model)
        else:
            self.take_named(model, "encoder")

    def new_figures(self) -> nn.ModuleDict:
        """Loss and the two correlations."""
        return nn.ModuleDict({"loss": MeanMetric(), "spearman": SpearmanCorrCoef(), "pearson": PearsonCorrCoef()})

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The embeddings of texts (batch, length) or of groups of texts (batch, group, length): the same shape with the
        width of the model in place of the length."""
        shape = inputs["input_ids"].shape
        flat = {name: value.reshape(-1, shape[-1]) for name, value in inputs.items()}
        hidden = self.model(**flat).last_hidden_state.float()  # (texts, length, width)
        mask = flat.get("attention_mask", hidden.new_ones(hidden.shape[:2]))[..., None]  # (texts, length, 1)
        means = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return means.reshape(*shape[:-1], -1)

    def measure(self, figures: nn.ModuleDict, batch: Batch) -> None:
        """Adds a batch to the metrics.

        Raises:
            DataError: if it holds no pairs, or no labels.
        """
        cosines, labels = self._cosines(self.embed(inputs_of(batch))), labels_of(batch).float()
        figures["loss"].update(F.mse_loss(cosines, labels), weight=len(labels))
        for name in ("spearman", "pearson"):
            figures[name].update(cosines, labels)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean squared difference of cosines and labels, logged as train_loss. If there is a teacher, it is mixed
        with the distance from the teacher's embeddings, logged as train_divergence.

        Raises:
            DataError: if a batch holds no pairs, or no labels although they are needed.
            SparsefitError: if the loss is NaN.
        """
        inputs = inputs_of(batch)
        taught = self.taught(self.embed, inputs)
        embedded = self.embed(inputs)
        if self.taught_alone(taught):
            return self.distilled(None, embedded, taught)
        labels = labels_of(batch).float()
        loss = F.mse_loss(self._cosines(embedded), labels)
        check_loss(loss, batch_idx)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return self.distilled(loss, embedded, taught)

    def distance(self, student: Tensor, taught: Tensor, counted: Tensor | None = None) -> Tensor:
        """1 - the mean cosine of the student's and the teacher's embeddings."""
        return 1 - F.cosine_similarity(student, taught, dim=-1).mean()

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """The embeddings of a batch's texts; labels are ignored."""
        return self.embed(inputs_of(batch))

    def calibration_step(self, batch: Batch) -> dict[str, Tensor]:
        """The calibration pass. Named, as a plain tensor might be taken for logits."""
        return {"embeddings": self.embed(inputs_of(batch))}

    def _cosines(self, embedded: Tensor) -> Tensor:
        if embedded.ndim != 3 or embedded.shape[1] != 2:
            raise DataError(
                f"the embeddings of a batch are {tuple(embedded.shape)}, but those of pairs of texts are (batch, 2, "
                "width): give input_ids and attention_mask (batch, 2, length), as LabelledTextDataModule does with the "
                "task pairs"
            )
        return F.cosine_similarity(embedded[:, 0], embedded[:, 1], dim=-1)
