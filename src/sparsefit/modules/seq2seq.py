"""A LightningModule that trains a sequence-to-sequence model on text or audio; it contains no pruning code."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.text import Perplexity, WordErrorRate

from sparsefit.errors import ConfigError
from sparsefit.evaluation.perplexity import IGNORED
from sparsefit.modules.loading import find_feature_extractor
from sparsefit.modules.measured_module import Batch, MeasuredModule, check_loss, inputs_of, labels_of
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.settings import as_text, number


class Seq2SeqModule(MeasuredModule):
    """Training of a transformers encoder-decoder, such as T5 or Whisper: all of it, its kept weights, or adapters.

    Batches are mappings: the outputs of the model's processor (input_ids and attention_mask, or input_features), and
    "labels" (batch, length), the target tokens, in which -100 is ignored.

    Attributes:
        feature_extractor: the model's audio feature extractor, if it has one; it is exported with the model.

    Args:
        model: a folder or a hub name; in Python also a model.
        adapter: what is trained while the rest is frozen; None trains all of the model. T5's attention has the layers
            q, k, v and o.
        distill: learn also from the model as it was when the fit began (dense, if the fit prunes it), not only from
            the labels.
        generated_tokens: in validation and tests, generate up to so many tokens for each input to measure the word
            error rate, as for speech recognition; 0 does not.
        **settings: of `RecoverableModule`: learning_rate, weight_decay, optimizer, dtype, gradient_checkpointing,
            attn_implementation.
    """

    metrics: ClassVar[dict[str, str]] = {"perplexity": "lower", "token_accuracy": "higher"}
    """What `evaluate` measures, and whether higher or lower is better; each token is predicted from the true ones
    before it. With `generated_tokens` also word_error_rate."""

    def __init__(
        self,
        model: str,
        adapter: AdapterSettings | None = None,
        distill: DistillSettings | None = None,
        generated_tokens: int = 0,
        **settings: Any,
    ) -> None:
        model = as_text(model)
        super().__init__(model, adapter, distill, **settings)
        number("generated_tokens", generated_tokens, least=0, whole=True)
        self.save_hyperparameters({"generated_tokens": generated_tokens})
        if generated_tokens:
            self.metrics = self.metrics | {"word_error_rate": "lower"}
        self.take_named(model, "seq2seq")
        self.feature_extractor = find_feature_extractor(model) if isinstance(model, str) else None

    def new_figures(self) -> nn.ModuleDict:
        """Loss, perplexity, token_accuracy, and word_error_rate with `generated_tokens`."""
        figures = nn.ModuleDict(
            {"loss": MeanMetric(), "perplexity": Perplexity(ignore_index=IGNORED), "token_accuracy": BinaryAccuracy()}
        )
        if self.hparams.generated_tokens:
            figures["word_error_rate"] = WordErrorRate()
        return figures

    def measure(self, figures: nn.ModuleDict, batch: Batch) -> None:
        """Adds a batch to the metrics."""
        labels = labels_of(batch)  # (batch, length)
        counted = labels != IGNORED
        if not bool(counted.any()):
            return
        output = self._call(batch)
        figures["loss"].update(output.loss.float(), weight=counted.sum())
        figures["perplexity"].update(output.logits.float(), labels)
        right = (output.logits.argmax(-1) == labels)[counted]
        figures["token_accuracy"].update(right.int(), torch.ones_like(right, dtype=torch.int))
        if "word_error_rate" in figures:
            figures["word_error_rate"].update(*self._written(batch, labels))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The model's own mean loss per token, logged as train_loss. If there is a teacher, it is mixed with the
        divergence from the teacher, logged as train_divergence.

        Raises:
            SparsefitError: if the loss is NaN.
        """
        labels = labels_of(batch)
        taught = self.taught(self._call, batch)
        output = self._call(batch)
        check_loss(output.loss, batch_idx)
        self.log("train_loss", output.loss, prog_bar=True, batch_size=len(labels))
        return self.distilled(
            output.loss, output.logits, taught.logits if taught is not None else None, labels != IGNORED
        )

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Any:
        """Calls the model with the whole batch: its decoder reads the labels."""
        return self._call(batch)

    def _call(self, batch: Batch) -> Any:
        return self.model(**self._fitting(batch))

    def _fitting(self, batch: Batch) -> dict[str, Any]:
        """A batch with its floating-point tensors in the dtype of the weights."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
        }

    def _written(self, batch: Batch, labels: Tensor) -> tuple[list[str], list[str]]:
        """The generated texts and the target texts."""
        if self.tokenizer is None:
            raise ConfigError(
                "generated_tokens needs a tokenizer to read what the model writes, and there is none in its folder: "
                "save it there, or set the module's attribute `tokenizer`"
            )
        inputs = inputs_of(self._fitting(batch))
        inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        written = self.model.generate(**inputs, max_new_tokens=self.hparams.generated_tokens)
        true = labels.masked_fill(labels == IGNORED, self.tokenizer.pad_token_id)
        found, wanted = (self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (written, true))
        return found, wanted
