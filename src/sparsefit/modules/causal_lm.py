"""A causal language model to train: a LightningModule that knows nothing of pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from sparsefit.evaluation.perplexity import IGNORED, labels_of, model_inputs, next_token_loss, perplexity
from sparsefit.modules.loading import Dtype, load_causal_lm, load_tokenizer
from sparsefit.modules.optimizers import build_optimizer, check_settings, trained_parameters
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter, bind_masks
from sparsefit.recovery.distill import DenseTeacher, DistillSettings, divergence
from sparsefit.recovery.sparse_base import complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CausalLMModule(LightningModule):
    """Next-token training of a transformers model: all of it, its kept weights, or adapters on it.

    Batches are {"input_ids": (batch, length)}, with attention_mask and labels where there are any.

    Attributes:
        model: the transformers model, PEFT-wrapped where `adapter` asks for one of PEFT's.
        teacher: the dense model that the loss looks at, where `distill` is given and a fit has begun.
        tokenizer: the model's tokenizer; None for a model built in Python.

    Args:
        model: "tiny-llama", a folder or a hub name; in Python also a model.
        adapter: what is trained while the rest is frozen; None trains all of the model.
        distill: learn from the model as it was when the fit began (dense, if the fit prunes it), and not from the
            text alone.
        learning_rate: of AdamW; it stays as it is unless a callback changes it.
        weight_decay: of AdamW.
        optimizer: "adamw", or "adamw_8bit": bitsandbytes' AdamW, which holds its two moments in 8 bits, but those of
            tensors below 4,096 weights.
        dtype: the weights' dtype; "auto" is the one they were saved in. A model built in Python keeps its own.
        gradient_checkpointing: compute activations twice to hold fewer of them.
        attn_implementation: transformers' attention: "sdpa", "eager", "flash_attention_2"; None is its choice.
    """

    metrics: ClassVar[dict[str, str]] = {"perplexity": "lower"}
    """What `evaluate` measures, and which way is better."""

    def __init__(
        self,
        model: str,
        adapter: AdapterSettings | None = None,
        distill: DistillSettings | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        # As a checkpoint keeps them.
        adapter = AdapterSettings(**adapter) if isinstance(adapter, Mapping) else adapter
        distill = DistillSettings(**distill) if isinstance(distill, Mapping) else distill
        check_settings(optimizer, ("adamw", "adamw_8bit"), learning_rate, weight_decay)
        # Plain values only: a checkpoint must load with weights_only=True.
        self.save_hyperparameters(
            {
                "model": model if isinstance(model, str) else str(model.config.name_or_path),
                "adapter": asdict(adapter) if adapter is not None else None,
                "distill": asdict(distill) if distill is not None else None,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "optimizer": optimizer,
                "dtype": dtype,
                "gradient_checkpointing": gradient_checkpointing,
                "attn_implementation": attn_implementation,
            }
        )
        # Loaded here and not in configure_model: the model is there to look at, prune or save without a Trainer, a
        # wrong name is told before any data is read, and a resumed run restores into a model of the right shape.
        self.tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(model) if isinstance(model, str) else None
        base = load_causal_lm(model, dtype, attn_implementation) if isinstance(model, str) else model
        if gradient_checkpointing:
            _checkpoint_gradients(base)
        self.model = attach_adapter(base, adapter) if adapter is not None else base
        self.distill = distill
        self.teacher: DenseTeacher | None = None
        self.model.train()  # from_pretrained returns a model in evaluation mode
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()

    def forward(self, **batch: Tensor) -> Any:
        """Calls the model; its answer has `logits` (batch, length, vocabulary), and `loss` if `labels` are given."""
        return self.model(**batch)

    def setup(self, stage: str) -> None:
        """Take the model as it is now, before it is pruned or a checkpoint is read, as the teacher."""
        if stage != "fit" or self.distill is None:
            return
        with self.teacher.in_place(self.model) if self.teacher is not None else nullcontext():  # of an earlier fit
            self.teacher = DenseTeacher(self.model)

    def on_train_start(self) -> None:
        """Let the teacher go of all that it shares with the model."""
        if self.teacher is not None:
            self.teacher.settle(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill up a checkpoint that holds only what changes, and give masked adapters their masks: for
        `load_from_checkpoint`, which knows no callbacks."""
        left_out = (checkpoint.get("sparsefit") or {}).get("base")
        if left_out is not None and not left_out["entries"].keys() <= checkpoint["state_dict"].keys():
            complete(checkpoint, left_out, Path("that is loaded"), [])
        states = (checkpoint.get("callbacks") or {}).values()
        if masks := next((s["masks"] for s in states if isinstance(s, Mapping) and "masks" in s), None):
            bind_masks(self, MaskSet.from_state_dict(masks))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own mean next-token loss, logged as train_loss; mixed with the divergence from the teacher,
        logged as train_divergence, where there is one."""
        inputs, labels = model_inputs(batch), labels_of(batch)
        taught = None
        if self.teacher is not None:
            with self.teacher.in_place(self.model):
                taught = self.model(**inputs).logits
        output = self.model(**inputs, labels=labels)
        self.log("train_loss", output.loss, prog_bar=True, batch_size=len(labels))
        if taught is None:
            return output.loss
        # Where the loss on the text counts: what stands before a token that counts.
        counted = labels[:, 1:] != IGNORED
        away = divergence(output.logits[:, :-1], taught[:, :-1], counted, self.distill.temperature)
        self.log("train_divergence", away, prog_bar=True, batch_size=len(labels))
        return (1 - self.distill.weight) * output.loss + self.distill.weight * away

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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what is trained, at a constant rate."""
        settings = (self.hparams.learning_rate, self.hparams.weight_decay)
        return build_optimizer(self.hparams.optimizer, trained_parameters(self), *settings)

    def evaluate(
        self, loader: Iterable[Mapping[str, Tensor]], progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """{"perplexity": of the loader's text}; `progress` is called with the number of batches done."""
        return {"perplexity": perplexity(self.model, loader, progress)}

    def _add_loss(self, metric: MeanMetric, batch: Mapping[str, Tensor]) -> None:
        loss, tokens = next_token_loss(self.predict_step(batch).logits, labels_of(batch))
        metric.update(loss / tokens.clamp(min=1), weight=tokens)

    def _log_loss(self, stage: str, metric: MeanMetric) -> None:
        loss = metric.compute()
        metric.reset()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_perplexity": loss.exp()}, prog_bar=True, sync_dist=False)


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers 5
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # A checkpointed block whose inputs need no gradient gives its adapters none either: the embedding of a frozen
    # base does not, so its output is told to.
    model.enable_input_require_grads()
    model.config.use_cache = False
