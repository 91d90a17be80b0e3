"""Checkpoints that are saved at odd moments of odd loops, and resumed."""

from __future__ import annotations

import csv
import signal

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from resumed_runs import Stop, assert_same, fit, weights
from small_runs import Classifier, labelled
from torch.utils.data import DataLoader, IterableDataset

from sparsefit.callbacks import SparseCheckpoints, WandaPruning

EPOCHS = 4
BATCHES = 5  # of an epoch


class Endless(IterableDataset):
    """Samples without a length, in an order of the epoch's own."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return (self.samples[i] for i in torch.randperm(len(self.samples)).tolist())


class Data(LightningDataModule):
    """Shuffled by the global random numbers, and so resumed at the ends of epochs alone."""

    def __init__(self, endless):
        super().__init__()
        self.endless = endless

    def train_dataloader(self):
        samples = labelled(4 * BATCHES).dataset
        return DataLoader(Endless(samples), 4) if self.endless else DataLoader(samples, 4, shuffle=True)

    def val_dataloader(self):
        return labelled(8, seed=1)

    def calibration_dataloader(self):
        return labelled(8, seed=2)


class Drawing(Classifier):
    """Trains with noise, and draws random numbers as it validates; its rate falls with every step."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] + 0.1 * torch.randn(6), batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.rand(()))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TwoSteps(Drawing):
    """Steps by itself, twice a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(Classifier.training_step(self, (batch[0] + torch.randn(6), batch[1]), batch_idx))
            optimizer.step()


@pytest.fixture(autouse=True)
def interruptible():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def callbacks(folder):
    return [SparseCheckpoints(str(folder)), WandaPruning()]


class Unvalidated(Data):
    val_dataloader = None


KINDS = {
    "endless": lambda: Data(endless=True),
    "with a length": lambda: Data(endless=False),
    "endless, unvalidated": lambda: Unvalidated(endless=True),
    "with a length, unvalidated": lambda: Unvalidated(endless=False),
}
FITS = {
    "steps": {"max_steps": EPOCHS * BATCHES, "max_epochs": -1},
    "epochs": {"max_epochs": EPOCHS},
}
MOMENTS = {
    "end of an epoch's last batch": ("on_train_batch_end", 2 * BATCHES),
    "in a validation": ("on_validation_batch_end", 3),  # the first two are the sanity check
    "end of a validation": ("on_validation_end", 3),
    "end of an epoch": ("on_train_epoch_end", 2),
    "start of an epoch": ("on_train_epoch_start", 3),
    "start of an epoch's first batch": ("on_train_batch_start", 2 * BATCHES + 1),
    "in an epoch's first batch": ("on_after_backward", 2 * BATCHES + 1),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights after a run that is never interrupted; each is run once."""
    runs = {}

    def run(cls, kind, limit):
        if (cls, kind, limit) not in runs:
            trained = cls()
            fit(trained, KINDS[kind](), *callbacks(tmp_path_factory.mktemp("run")), **FITS[limit])
            runs[cls, kind, limit] = weights(trained)
        return runs[cls, kind, limit]

    return run


class Interrupted(Stop):
    """Saves where it is interrupted."""

    def __init__(self, path, hook, number):
        super().__init__(hook, number)
        self.path = path

    def on_exception(self, trainer, *args):
        trainer.save_checkpoint(self.path)


def interrupted(path, hook, number, cls, kind, limit, ckpt_path=None):
    """A checkpoint of a run whose first callback is interrupted."""
    used = [Interrupted(path, hook, number), *callbacks(path.parent / "run")]
    with pytest.raises(SystemExit):
        fit(cls(), KINDS[kind](), *used, ckpt_path=ckpt_path, **FITS[limit])
    return path


def resumed(folder, path, cls, kind, limit):
    trained = cls()
    fit(trained, KINDS[kind](), *callbacks(folder / "run"), ckpt_path=path, **FITS[limit])
    return weights(trained)


@pytest.mark.slow
@pytest.mark.parametrize("limit", FITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_between_two_epochs_changes_nothing(straight, tmp_path, moment, kind, limit):
    if "validation" in moment and "unvalidated" in kind:
        pytest.skip("there is none")
    run = Drawing, kind, limit
    path = interrupted(tmp_path / "saved.ckpt", *MOMENTS[moment], *run)
    assert torch.load(path, weights_only=True)["sparsefit"]["whole_step"]
    assert_same(resumed(tmp_path, path, *run), straight(*run))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_loggers_get_the_same_steps(tmp_path, hook):
    class Logs(Drawing):
        def training_step(self, batch, batch_idx):
            self.log("loss", loss := super().training_step(batch, batch_idx))
            return loss

    number = BATCHES if hook == "on_train_batch_end" else 1
    run = Logs, "with a length, unvalidated", "epochs"
    path = interrupted(tmp_path / "saved.ckpt", hook, number, *run)
    logger = CSVLogger(tmp_path, name="logs", version=0)
    fit(Logs(), KINDS[run[1]](), *callbacks(tmp_path / "run"), ckpt_path=path, logger=logger, **FITS["epochs"])
    rows = csv.DictReader((tmp_path / "logs/version_0/metrics.csv").open())
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(BATCHES, EPOCHS * BATCHES))


@pytest.mark.parametrize("number", [1, BATCHES + 1])  # of the batch where it was interrupted first
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start"])
def test_a_run_that_is_interrupted_before_it_does_a_batch_continues_from_where_it_was(straight, tmp_path, hook, number):
    run = Drawing, "with a length", "epochs"
    path = interrupted(tmp_path / "0.ckpt", "on_after_backward", number, *run)
    for again in range(2):
        path = interrupted(tmp_path / f"{again + 1}.ckpt", hook, 1, *run, ckpt_path=path)
    assert_same(resumed(tmp_path, path, *run), straight(*run))


class CalibratesOnTraining(Data):
    calibration_dataloader = None


@pytest.mark.parametrize("endless", [True, False])
def test_a_run_that_calibrates_on_its_training_data_can_begin_again_from_its_start(tmp_path, endless):
    straight, again, killed = Drawing(), Drawing(), tmp_path / "killed"
    fit(straight, CalibratesOnTraining(endless), *callbacks(tmp_path / "run"), max_steps=7)
    used = [*callbacks(killed), Stop("on_train_batch_start", 1)]
    with pytest.raises(SystemExit):
        fit(Drawing(), CalibratesOnTraining(endless), *used, max_steps=7)
    path = killed / "checkpoints/stage.ckpt"
    fit(again, CalibratesOnTraining(endless), *callbacks(killed), ckpt_path=path, max_steps=7)
    assert_same(weights(again), weights(straight))


class Resumable:
    """A loader that knows where it is, as torchdata's StatefulDataLoader."""

    batches = tuple(labelled(4 * BATCHES))
    done = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        begun = self.done % len(self)
        for number, batch in enumerate(self.batches[begun:], begun):
            self.done = number + 1
            yield batch
        self.done = 0

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


@pytest.mark.parametrize(("batch", "done"), [(4, 2), (BATCHES + 1, BATCHES)])
def test_a_loader_that_knows_where_it_is_goes_back_to_the_end_of_a_step(tmp_path, batch, done):
    class Read(Data):
        def train_dataloader(self):
            return Resumable()

    settings = {"accumulate_grad_batches": 2, "max_steps": 5}
    straight, resumed, path = Drawing(), Drawing(), tmp_path / "amid.ckpt"
    fit(straight, Read(False), *callbacks(tmp_path / "straight"), **settings)
    used = [Interrupted(path, "on_train_batch_start", batch), *callbacks(tmp_path / "run")]
    with pytest.raises(SystemExit):
        fit(Drawing(), Read(False), *used, **settings)
    fit(resumed, Read(False), *callbacks(tmp_path / "run"), ckpt_path=path, **settings)
    assert len(resumed.seen) == len(straight.seen) - done
    assert_same(weights(resumed), weights(straight))


def test_a_module_that_steps_by_itself(straight, tmp_path):
    run = TwoSteps, "with a length", "epochs"
    path = interrupted(tmp_path / "between.ckpt", "on_train_batch_start", BATCHES + 1, *run)
    assert_same(resumed(tmp_path, path, *run), straight(*run))
    path = interrupted(tmp_path / "amid.ckpt", "on_before_optimizer_step", 4, *run)  # one of the second batch's is done
    assert not torch.load(path, weights_only=True)["sparsefit"]["whole_step"]
