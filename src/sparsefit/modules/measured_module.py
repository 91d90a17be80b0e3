"""The base class of modules that use the same torchmetrics metrics in validation, in tests and in `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsefit.calibration.batches import to_device
from sparsefit.errors import DataError, SparsefitError
from sparsefit.evaluation.perplexity import IGNORED, evaluation_mode
from sparsefit.modules.loading import find_tokenizer, load_model, load_with_new_head
from sparsefit.modules.recoverable import RecoverableModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = Mapping[str, Tensor]


class MeasuredModule(RecoverableModule):
    """A transformers model with its metrics, which are called figures; a subclass defines them and adds batches.

    Attributes:
        tokenizer: the model's tokenizer; None for a model without one, or built in Python.
    """

    metrics: ClassVar[dict[str, str]] = {}
    """What `evaluate` measures, and whether higher or lower is better."""

    def new_figures(self) -> nn.ModuleDict:
        """New, empty metrics by name: all of `metrics`, and any others that are logged."""
        raise NotImplementedError

    def measure(self, figures: nn.ModuleDict, batch: Batch) -> None:
        """Adds a batch to the metrics."""
        raise NotImplementedError

    def take_named(
        self, model: str | nn.Module, kind: str, num_labels: int | None = None, new_head: bool = False
    ) -> None:
        """Load a model of a kind and its tokenizer, if it has one; or take a model that is given."""
        self.tokenizer: PreTrainedTokenizerBase | None = None
        new: list[str] = []
        if isinstance(model, str):
            settings = (self.hparams.dtype, self.hparams.attn_implementation)
            if new_head:
                base, new = load_with_new_head(model, kind, num_labels or 0, *settings)
            else:
                base = load_model(model, *settings, kind=kind)
            self.tokenizer = find_tokenizer(model)
            if self.tokenizer is not None and getattr(base.config, "pad_token_id", None) is None:
                # A decoder that classifies texts needs it to find the last token that is not padding.
                base.config.pad_token_id = padding_of(self.tokenizer)
        else:
            base = model
        self.take_model(base, new)

    def take_model(self, base: nn.Module, new_modules: Iterable[str] = ()) -> None:
        """As in `RecoverableModule`; also creates the metrics."""
        super().take_model(base, new_modules)
        self.figures = nn.ModuleDict({"val": self.new_figures(), "test": self.new_figures()})

    def forward(self, **batch: Tensor) -> Any:
        """Calls the model."""
        return self.model(**batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self.measure(self.figures["val"], batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics with the prefix `val_`."""
        self._log_figures("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self.measure(self.figures["test"], batch)

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics with the prefix `test_`."""
        self._log_figures("test")

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Any:
        """Calls the model with a batch without its labels, as calibration does."""
        return self.model(**inputs_of(batch))

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch], progress: Callable[[int], None] | None = None) -> dict[str, float]:
        """The values of `metrics` over a loader's batches; `progress` is called with the number of batches done.

        Raises:
            DataError: if there is no batch, or labels do not fit the model.
        """
        device = next(self.model.parameters()).device
        figures, number = self.new_figures().to(device), 0
        with evaluation_mode(self.model):
            for number, batch in enumerate(loader, 1):
                self.measure(figures, to_device(batch, device))
                if progress is not None:
                    progress(number)
        if not number:
            raise DataError("there is nothing to evaluate on: the data give no batch")
        return {name: float(figures[name].compute()) for name in self.metrics}

    def _log_figures(self, stage: str) -> None:
        for name, metric in self.figures[stage].items():
            if metric.update_called:
                self.log(f"{stage}_{name}", metric.compute(), prog_bar=True, sync_dist=False)
            metric.reset()


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the padding token, or of the end-of-text token if there is none, as with many decoders."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name not in ("labels", "label")}


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch.

    Raises:
        DataError: if it has none.
    """
    labels = batch.get("labels", batch.get("label"))
    if labels is None:
        raise DataError(f"a batch has no labels: it is a mapping with {', '.join(batch)}. Give it 'labels'")
    return labels


def check_loss(loss: Tensor, batch_idx: int) -> None:
    """Check that a loss is not NaN.

    Raises:
        SparsefitError: if it is.
    """
    if bool(loss.isnan()):
        raise SparsefitError(
            f"the training loss of batch {batch_idx} is not a number: training has diverged, a batch has no label "
            f"but {IGNORED}, or the weights are damaged. Lower the learning rate, clip gradients, or train in "
            "bf16-mixed, not float16"
        )
