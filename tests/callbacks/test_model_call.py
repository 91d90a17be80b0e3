"""What of a module takes the calibration batches; and that they are looked at before anything is spent."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from small_runs import Classifier, LanguageModel, fit, labelled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparsefit import prune
from sparsefit.callbacks import BlockwiseReconstruction, PrunedRunCallback, WandaPruning
from sparsefit.errors import CalibrationError

LENGTHS = [5, 16, 9, 7, 12, 3, 16, 11]


def padded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    mask = (torch.arange(16) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randint(3, 61, (8, 16), generator=random) * mask, mask, torch.randint(3, 61, (8, 16), generator=random)


def tuples(batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(*padded()), batch_size=batch_size)


def without_padding(model: nn.Module):
    ids = padded()[0]
    return prune(model, [{"input_ids": ids[row : row + 1, :length]} for row, length in enumerate(LENGTHS)])


class Tuples(LanguageModel):
    """Batches are (input_ids, attention_mask, labels)."""

    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        ids, mask, labels = batch
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        return loss


class Predicts(Tuples):
    def predict_step(self, batch, batch_idx):
        ids, mask, _ = batch
        return self.model(input_ids=ids, attention_mask=mask)


class MaskIsOptional(Tuples):
    """Handing over the first value alone would leave out the mask."""

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


class Generates(Tuples):
    def predict_step(self, batch, batch_idx):
        return self.model.generate(input_ids=batch[0], max_new_tokens=40)


class GeneratesByItself(Tuples):
    def predict_step(self, batch, batch_idx):
        ids = batch[0]
        for _ in range(9):
            ids = torch.cat([ids, self.model(ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids


class PredictsOthers(Tuples):
    """On data of another form."""

    def predict_step(self, batch, batch_idx):
        return self.model(batch["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 3])
@pytest.mark.parametrize(
    "module",
    [Tuples, Predicts, MaskIsOptional, Generates, GeneratesByItself, PredictsOthers],
    ids=lambda kind: kind.__name__,
)
def test_tuples_with_padding_count_what_is_real(tiny_model, module, batch_size):
    architecture = "llama" if "Generates" in module.__name__ else "bert"
    pruning = WandaPruning()
    fit(module(tiny_model(architecture)), tuples(batch_size), pruning, max_epochs=1)
    expected = without_padding(tiny_model(architecture))
    assert pruning.summary["tokens"] == sum(LENGTHS)
    assert all(torch.equal(pruning.masks[f"model.{name}"], mask) for name, mask in expected.masks.items())
    assert pruning.summary["notes"] == []


class Ratings(LightningModule):
    """Its forward takes two of the three parts of a batch."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item, self.automatic_optimization = nn.Embedding(9, 6), nn.Embedding(9, 6), not manual
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, user, item):
        return self.net(torch.cat([self.user(user), self.item(item)], dim=-1)).squeeze(-1)

    def training_step(self, batch, batch_idx):
        user, item, rating = batch
        return (self(user, item) - rating).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def ratings() -> DataLoader:
    random = torch.Generator().manual_seed(0)
    user, item = torch.randint(9, (2, 16), generator=random)
    return DataLoader(TensorDataset(user, item, torch.rand(16, generator=random)), batch_size=4)


def test_three_parts_go_to_a_forward_of_two_as_training_sends_them():
    pruning = WandaPruning()
    fit(Ratings(), ratings(), pruning, max_steps=0)
    user, item, _ = ratings().dataset.tensors
    expected = prune(Ratings(), [(user, item)])
    assert pruning.masks.digest() == expected.masks.digest()
    assert pruning.summary["samples"] == 16


def test_what_no_method_takes_names_calibration_step():
    """A training step that optimizes by itself is never taken."""
    module = Ratings(manual=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(
        CalibrationError, match=r"3 values .*Ratings \(forward: .*item.*calibration_step\(self, batch\)"
    ):
        fit(module, ratings(), WandaPruning())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    module.calibration_step = lambda batch: module(batch[0], batch[1])
    pruning = WandaPruning()
    fit(module, ratings(), pruning, max_steps=0)
    user, item, _ = ratings().dataset.tensors
    assert pruning.masks.digest() == prune(Ratings(), [(user, item)]).masks.digest()


def test_a_calibration_step_that_fails_is_not_passed_over():
    module = Classifier()
    module.calibration_step = lambda batch: module(batch["x"])
    with pytest.raises(CalibrationError, match="calibration_step: TypeError"):
        fit(module, labelled(), WandaPruning())


def test_metrics_of_training_count_no_calibration():
    from torchmetrics.classification import MulticlassAccuracy

    class Measured(Classifier):
        forward = LightningModule.forward

        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(3)

        def training_step(self, batch, batch_idx):
            logits = self.model(batch[0])
            self.accuracy(logits, batch[1])
            self.log("accuracy", self.accuracy)
            return nn.functional.cross_entropy(logits, batch[1])

    module, pruning = Measured(), WandaPruning()
    fit(module, labelled(), pruning, max_steps=0)
    assert pruning.summary["samples"] == 16
    assert not module.accuracy.update_called


class Spending(PrunedRunCallback):
    """As the evaluation of the dense model is."""

    spent = False

    def on_pruning_start(self, trainer, module):
        self.spent = True


def not_enough():
    raise CalibrationError("0 of 1480 documents are long enough")


@pytest.mark.parametrize(
    ("module", "pruning", "message"),
    [
        (Classifier, {"calibration": []}, "0 calibration samples"),
        (Classifier, {"calibration": labelled(4), "calibration_samples": 5}, "5 were asked for"),
        (Classifier, {"calibration": [(torch.randn(4, 7), torch.ones(4))]}, "calibration_step"),
        (lambda: Ratings(manual=True), {}, "calibration_step"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_wrong_data_are_reported_before_the_dense_model_is_evaluated(module, pruning, message, first):
    spending, pruning = Spending(), WandaPruning(**pruning)
    with pytest.raises(CalibrationError, match=message):
        fit(module(), ratings(), *([spending, pruning] if first else [pruning, spending]))
    assert not spending.spent


def test_wrong_data_of_the_reconstruction_are_reported_as_early():
    spending = Spending()
    blocks = BlockwiseReconstruction(passes=1, calibration=[(torch.randn(4, 7), torch.ones(4))])
    with pytest.raises(CalibrationError, match="calibration_step"):
        fit(Classifier(), labelled(), spending, WandaPruning(), blocks)
    assert not spending.spent
