"""A LightningModule that trains a causal language model; it contains no pruning code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchmetrics import MeanMetric

from sparsefit.evaluation.perplexity import IGNORED, labels_of, model_inputs, next_token_loss, perplexity
from sparsefit.modules.loading import find_tokenizer, load_causal_lm
from sparsefit.modules.recoverable import RecoverableModule
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.settings import as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CausalLMModule(RecoverableModule):
    """Next-token training of a transformers model: all of it, its kept weights, or adapters on it.

    Batches are {"input_ids": (batch, length)}, optionally with attention_mask and labels.

    Attributes:
        model: the transformers model, PEFT-wrapped if `adapter` is one of PEFT's.
        tokenizer: the model's tokenizer; None for a model without one, or built in Python.

    Args:
        model: "tiny-llama", a folder, a .gguf file or a hub name; in Python also a model.
        adapter: what is trained while the rest is frozen; None trains all of the model.
        distill: learn also from the model as it was when the fit began (dense, if the fit prunes it), not only from
            the text.
        **settings: of `RecoverableModule`: learning_rate, weight_decay, optimizer, dtype, gradient_checkpointing,
            attn_implementation.
    """

    metrics: ClassVar[dict[str, str]] = {"perplexity": "lower"}
    """What `evaluate` measures, and whether higher or lower is better."""

    def __init__(
        self,
        model: str,
        adapter: AdapterSettings | None = None,
        distill: DistillSettings | None = None,
        **settings: Any,
    ) -> None:
        model = as_text(model)
        super().__init__(model, adapter, distill, **settings)
        named = isinstance(model, str)
        dtype, attention = self.hparams.dtype, self.hparams.attn_implementation
        self.take_model(load_causal_lm(model, dtype, attention) if named else model)
        self.tokenizer: PreTrainedTokenizerBase | None = find_tokenizer(model) if named else None
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()

    def forward(self, **batch: Tensor) -> Any:
        """Calls the model; its output has `logits` (batch, length, vocabulary), and `loss` if `labels` are given."""
        return self.model(**batch)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own mean next-token loss, logged as train_loss. If there is a teacher, it is mixed with the
        divergence from the teacher, logged as train_divergence; with a weight of 1 only that is computed."""
        inputs, labels = model_inputs(batch), labels_of(batch)
        taught = self.taught(self.model, **inputs)
        # The divergence counts where the loss on the text does: at positions before a token that counts.
        counted = labels[:, 1:] != IGNORED
        if self.taught_alone(taught):
            output = self.model(**inputs)
            return self.distilled(None, output.logits[:, :-1], taught.logits[:, :-1], counted)
        output = self.model(**inputs, labels=labels)
        self.log("train_loss", output.loss, prog_bar=True, batch_size=len(labels))
        if taught is None:
            return output.loss
        return self.distilled(output.loss, output.logits[:, :-1], taught.logits[:, :-1], counted)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to val_loss."""
        self._add_loss(self.val_loss, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs val_loss and val_perplexity."""
        self._log_loss("val", self.val_loss)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to test_loss."""
        self._add_loss(self.test_loss, batch)

    def on_test_epoch_end(self) -> None:
        """Logs test_loss and test_perplexity."""
        self._log_loss("test", self.test_loss)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int = 0) -> Any:
        """Calls the model with the batch's tokens and attention mask alone, as calibration does."""
        return self.model(**model_inputs(batch))

    def evaluate(
        self, loader: Iterable[Mapping[str, Tensor]], progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """{"perplexity": the loader's text perplexity}; `progress` is called with the number of batches done."""
        return {"perplexity": perplexity(self.model, loader, progress)}

    def _add_loss(self, metric: MeanMetric, batch: Mapping[str, Tensor]) -> None:
        loss, tokens = next_token_loss(self.predict_step(batch).logits, labels_of(batch))
        metric.update(loss / tokens.clamp(min=1), weight=tokens)

    def _log_loss(self, stage: str, metric: MeanMetric) -> None:
        loss = metric.compute()
        metric.reset()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_perplexity": loss.exp()}, prog_bar=True, sync_dist=False)
