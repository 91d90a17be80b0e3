from __future__ import annotations

import itertools
import random

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from small_runs import Classifier, Data, LanguageModel, fit, labelled, text
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from sparsefit import prune
from sparsefit.callbacks import WandaPruning
from sparsefit.callbacks.calibration import calibration_batches
from sparsefit.errors import CalibrationError


class Rows(Dataset):
    """Rows that carry their index, noise from the global generators, and (in workers) nothing else."""

    def __init__(self, samples: int = 24) -> None:
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        row = torch.full((6,), float(index))
        row[1] += torch.rand(())
        row[2] += random.random()
        row[3] += numpy.random.rand()
        return row, torch.tensor(index % 3)


class Stream(IterableDataset):
    def __init__(self, samples: int = 24) -> None:
        self.rows = Rows(samples)

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.rows[index] for index in range(first, self.rows.samples, step))


class Drawn(IterableDataset):
    """Shuffles anew in each pass, with a generator of its own."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __iter__(self):
        rows = Rows()
        return (rows[index] for index in self.random.sample(range(24), 24))


class Collate:
    def __call__(self, samples):
        return torch.stack([x for x, _ in samples]) * 0.1, torch.stack([y for _, y in samples])


class Batches:
    """No loader at all."""

    def __iter__(self):
        return iter(labelled(24))


class OwnLoader(DataLoader):
    """A loader of somebody's own class."""


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOADERS = {
    "in order": lambda: DataLoader(Rows(), batch_size=4, collate_fn=Collate()),
    "shuffled": lambda: DataLoader(Rows(), batch_size=4, shuffle=True),
    "own generator": lambda: DataLoader(Rows(), batch_size=5, shuffle=True, drop_last=True, generator=seeded()),
    "weighted": lambda: DataLoader(
        Rows(), batch_size=4, sampler=torch.utils.data.WeightedRandomSampler(torch.ones(24), 24, generator=seeded())
    ),
    "batch sampler": lambda: DataLoader(
        Rows(),
        batch_sampler=torch.utils.data.BatchSampler(
            torch.utils.data.RandomSampler(Rows(), generator=seeded()), 4, True
        ),
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "stream that draws": lambda: DataLoader(Drawn(), batch_size=4),
    "workers": lambda: DataLoader(Rows(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True),
    "stream with workers": lambda: DataLoader(Stream(), batch_size=4, num_workers=2),
    "own class": lambda: OwnLoader(Rows(), batch_size=4, shuffle=True),
    "any iterable": lambda: Batches(),
    "several": lambda: {
        "a": DataLoader(Rows(), batch_size=4, shuffle=True, generator=seeded()),
        "b": DataLoader(Rows(12), batch_size=4, shuffle=True),
    },
}


class Notes(Classifier):
    """Takes one loader's batches, or those of several."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch["a"][0] if isinstance(batch, dict) else batch[0])


def seen_in_training(make, pruning: list[Callback]) -> list[torch.Tensor]:
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    module, loader = Notes(), make()
    torch.manual_seed(4)
    fit(module, loader, *pruning, max_epochs=2)
    module.seen.append(torch.tensor([torch.rand(()), random.random(), numpy.random.rand()]))
    return module.seen


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_training_sees_what_it_would_have_seen(name):
    expected = seen_in_training(LOADERS[name], [])
    pruning = WandaPruning(calibration_samples=10)
    seen = seen_in_training(LOADERS[name], [pruning])
    assert len(expected) > 4
    assert [batch.tolist() for batch in seen] == [batch.tolist() for batch in expected]
    assert pruning.summary["samples"] == 10
    assert pruning.summary["source"] == "the training data"


def test_the_first_training_batches_serve_where_there_is_nothing_else():
    module, pruning = Classifier(), WandaPruning(calibration_samples=10)
    fit(module, labelled(), pruning)
    expected = prune(Classifier(), [torch.cat(module.seen)[:10]]).masks
    assert pruning.masks.digest() == expected.digest()


@pytest.mark.parametrize(
    ("argument", "datamodule", "used", "source"),
    [
        (7, 8, 7, "the calibration argument"),
        (None, 8, 8, "the datamodule's calibration_dataloader()"),
        (None, None, 0, "the training data"),
    ],
)
def test_the_order_of_the_sources(argument, datamodule, used, source):
    pruning = WandaPruning(calibration=None if argument is None else labelled(8, seed=argument))
    fit(Classifier(), Data(calibration=datamodule), pruning)
    rows = labelled(16 if used == 0 else 8, seed=used)
    assert pruning.masks.digest() == prune(Classifier(), [x for x, _ in rows]).masks.digest()
    assert pruning.summary["source"] == source


@pytest.mark.parametrize(("asked", "used"), [(None, 8), (5, 5), (8, 8)])
def test_as_many_samples_as_asked_for(asked, used):
    pruning = WandaPruning(calibration=labelled(8), calibration_samples=asked)
    fit(Classifier(), labelled(), pruning, max_steps=0)
    x = torch.cat([x for x, _ in labelled(8)])
    assert pruning.summary["samples"] == used
    assert pruning.masks.digest() == prune(Classifier(), [x[:used]]).masks.digest()


def test_samples_are_counted_by_tensors_whatever_else_is_in_the_batch():
    batches = [{"id": ["a", "b"], "x": torch.randn(2, 6)} for _ in range(4)]
    taken, _ = calibration_batches(Trainer(logger=False, enable_checkpointing=False), batches, 4)
    assert sum(len(batch["x"]) for batch in taken) == 4


def one_shot_stream():
    class OneShot(IterableDataset):
        def __init__(self):
            self.rows = iter(Rows())

        def __iter__(self):
            return self.rows

    return DataLoader(OneShot(), batch_size=4)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: iter(labelled()), {}, "can be read only once"),
        (lambda: (batch for batch in labelled()), {}, "can be read only once"),
        (one_shot_stream, {}, "can be read only once"),
        (lambda: {"a": iter(labelled()), "b": labelled()}, {}, "can be read only once"),
        (labelled, {"calibration_samples": 17}, "gives 16 calibration samples; 17 were asked for"),
        (labelled, {"calibration": []}, "the calibration argument gives 0 calibration samples"),
        (labelled, {"calibration": labelled(3), "calibration_samples": 4}, "gives 3 .* 4 were asked for"),
    ],
)
def test_data_that_cannot_serve_are_refused_with_the_model_dense(make, settings, message):
    module, before = Notes(), Notes().state_dict()
    with pytest.raises(CalibrationError, match=message):
        fit(module, make(), WandaPruning(**settings))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.seen


def test_an_iterator_serves_as_the_argument_and_for_a_score_without_data():
    pruning = WandaPruning(calibration=iter(labelled()))
    module = Classifier()
    fit(module, iter(list(labelled())), pruning, max_epochs=1)
    assert pruning.summary["samples"] == 16
    assert len(module.seen) == 4
    fit(module := Classifier(), iter(list(labelled())), WandaPruning(score="magnitude"), max_epochs=1)
    assert len(module.seen) == 4


# How a batch reaches the model.


class OwnStep(Classifier):
    def calibration_step(self, batch):
        return self(-batch[0])

    def predict_step(self, batch, batch_idx):
        raise AssertionError("calibration_step comes first")


class OwnPredict(Classifier):
    def predict_step(self, batch, batch_idx):
        return self(-batch[0])


class TwoInputs(Classifier):
    def forward(self, batch, scale=1.0):
        return self.model(-batch[0] * scale)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()


class Transfers(Classifier):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device((batch[0] * -1, batch[1]), device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        # Data augmentation, as the documentation of Lightning shows it: for training alone.
        return (batch[0] * 100, batch[1]) if self.trainer.training else (batch[0] + 1, batch[1])


class TransferringData(Data):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return -batch[0], batch[1]


@pytest.mark.parametrize("module", [OwnStep, OwnPredict, Transfers])
def test_a_batch_takes_the_way_of_predict(module):
    pruning = WandaPruning()
    fit(module(), labelled(), pruning, max_steps=0)
    expected = prune(Classifier(), [-x for x, _ in labelled()]).masks
    assert pruning.masks.digest() == expected.digest()
    assert pruning.masks.digest() != prune(Classifier(), [x for x, _ in labelled()]).masks.digest()


def test_a_forward_that_takes_the_whole_batch_gets_it():
    class Whole(Classifier):
        def forward(self, x, y):
            return self.model(-x) + y[:, None]

        def predict_step(self, batch, batch_idx):
            return self(*batch)

    pruning = WandaPruning()
    fit(Whole(), labelled(), pruning, max_steps=0)
    assert pruning.masks.digest() == prune(Classifier(), [-x for x, _ in labelled()]).masks.digest()


def test_the_hooks_of_the_datamodule_come_first():
    pruning = WandaPruning()
    fit(Transfers(), TransferringData(), pruning, max_steps=0)
    assert pruning.masks.digest() == prune(Classifier(), [x + 1 for x, _ in labelled()]).masks.digest()


@pytest.mark.parametrize("names", ["x y", "**"])
def test_a_mapping_reaches_the_arguments_that_forward_has(names):
    class Named(Classifier):
        def forward(self, x, scale=-1.0):
            return self.model(x * scale)

    class AnyName(Classifier):
        def forward(self, **inputs):
            assert set(inputs) == {"x", "y"}
            return self.model(-inputs["x"])

    rows = [{"x": x, "y": y} for x, y in labelled()]
    pruning = WandaPruning(calibration=rows)
    fit(AnyName() if names == "**" else Named(), labelled(), pruning, max_steps=0)
    assert pruning.masks.digest() == prune(Classifier(), [-x for x, _ in labelled()]).masks.digest()


def test_the_error_for_a_model_that_cannot_be_called_says_what_to_define():
    module = type("NoForward", (Classifier,), {"forward": LightningModule.forward})()
    with pytest.raises(CalibrationError, match=r"forward.*predict_step.*calibration_step"):
        fit(module, labelled(), WandaPruning())


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(tiny_model, side):
    rows = next(iter(text(4, batch_size=4)))["input_ids"]
    padded = []
    for row, real in zip(rows, (10, 7, 4, 9), strict=True):
        pad = torch.zeros(10 - real, dtype=torch.long)
        ids, mask = [row[:real], pad], [torch.ones(real, dtype=torch.long), pad]
        order = slice(None) if side == "right" else slice(None, None, -1)
        ids, mask = torch.cat(ids[order]), torch.cat(mask[order])
        padded.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    pruning = WandaPruning(calibration=DataLoader(padded, batch_size=4))
    fit(LanguageModel(tiny_model("llama")), text(), pruning, max_steps=0)
    alone = [{"input_ids": row[None, :real]} for row, real in zip(rows, (10, 7, 4, 9), strict=True)]
    expected = prune(tiny_model("llama"), alone).masks
    assert all(torch.equal(pruning.masks[f"model.{name}"], mask) for name, mask in expected.items())
    assert pruning.summary["tokens"] == 30


def test_mixed_precision_calibrates_as_it_trains():
    full, mixed = WandaPruning(), WandaPruning()
    fit(Classifier(), labelled(), full, max_steps=0)
    fit(Classifier(), labelled(), mixed, max_steps=0, precision="bf16-mixed")
    same = [(full.masks[name] == mixed.masks[name]).float().mean() for name in full.masks]
    assert min(same) > 0.9
    assert mixed.result.update == "block"
    assert list(itertools.chain(full.result.notes, mixed.result.notes)) == []
