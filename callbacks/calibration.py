"""Calibration in a Lightning run: where the batches come from, and how they are sent through the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset

from sparsefit.calibration.samples import count_samples, cut_batch, split_samples
from sparsefit.callbacks.budgeted_progress import paid_progress
from sparsefit.callbacks.model_call import ModelCall
from sparsefit.callbacks.trainer_lookup import ledger_of
from sparsefit.errors import CalibrationError
from sparsefit.pruning import PruningConfig
from sparsefit.pruning.fisher_checks import check_sample
from sparsefit.pruning.input_watch import evaluating
from sparsefit.ranks import errors_on_all_ranks
from sparsefit.sharded import passes

TRAINING_SAMPLES = 128
"""Default number of samples when the training data serve as calibration data (the paper's number)."""


def calibration_batches(trainer: Trainer, source: Iterable[Any] | None, samples: int | None) -> tuple[list[Any], str]:
    """The batches to calibrate on: from `source`, else the datamodule's `calibration_dataloader()`, else the
    first batches of the training data. Training still sees these from the start and in the same order.

    If the dense model generates the data, the datamodule has a method `write_with(module, progress)`, called first.

    Args:
        trainer: A trainer that is about to fit.
        source: Batches given by the user, or None.
        samples: How many samples to take; None takes everything from a source made for calibration, and 128
            from training data. A batch whose samples cannot be separated is taken whole.

    Returns:
        The batches, and a description of where they come from.

    Raises:
        CalibrationError: if the source is empty, has fewer than `samples`, or can be read only once.
    """
    if callable(write := getattr(trainer.datamodule, "write_with", None)):
        shown = paid_progress(trainer, "the dense model writes text", "writing text")
        with ledger_of(trainer).stage("writing text"), shown as progress:
            write(trainer.lightning_module, progress)
    own = getattr(trainer.datamodule, "calibration_dataloader", None)
    with isolate_rng():
        if source is not None:
            name, batches = "the calibration argument", list(first_samples(source, samples))
        elif callable(own):
            name, batches = "the datamodule's calibration_dataloader()", list(first_samples(own(), samples))
        else:
            name, batches = "the training data", None
    if batches is None:
        loader = _training_loader(trainer)
        with isolate_rng(), _generators_restored(loader):
            _check_rereadable(loader)
            batches = list(first_samples(_single_process(loader), samples or TRAINING_SAMPLES))
    available = sum(map(count_samples, batches))
    if source is None and not callable(own) and samples is None and 0 < available < TRAINING_SAMPLES:
        rank_zero_warn(f"{name} gives only {available} calibration samples; {TRAINING_SAMPLES} are usual")
    if not batches or (samples is not None and available < samples):
        raise CalibrationError(
            f"{name} gives {available} calibration samples"
            + (f"; {samples} were asked for: give more data or a smaller calibration_samples" if batches else "; none")
        )
    return batches, name


def first_samples(source: Iterable[Any], samples: int | None) -> Iterator[Any]:
    """Yield batches until they hold the number of samples; the last batch is cut to size if possible."""
    taken = 0
    for batch in source:
        size = count_samples(batch)
        if samples is not None and taken + size > samples:
            yield cut_batch(batch, samples - taken)
            return
        yield batch
        taken += size
        if taken == samples:
            return


def _training_loader(trainer: Trainer) -> Any:
    trainer.fit_loop.setup_data()  # the fit loop calls this next anyway; a second call has no effect
    loader = trainer.train_dataloader
    if loader is None:
        raise CalibrationError(
            "there is nothing to calibrate on: no calibration data and no training data were given. Pass "
            "WandaPruning(calibration=...) or give the datamodule a calibration_dataloader()"
        )
    return loader


def _loaders(source: Any) -> list[Any]:
    """All loaders in training data, which may be a nested collection of loaders."""
    if isinstance(source, Mapping):
        source = list(source.values())
    return [loader for part in source for loader in _loaders(part)] if isinstance(source, list | tuple) else [source]


def _check_rereadable(source: Any) -> None:
    for loader in _loaders(source):
        dataset = getattr(loader, "dataset", None)
        if isinstance(loader, Iterator) or (isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset)):
            raise CalibrationError(
                "the training data can be read only once, so calibrating on it would take batches from training. Pass "
                "WandaPruning(calibration=...) or give the datamodule a calibration_dataloader()"
            )


def _single_process(loader: Any) -> Iterable[Any]:
    """A loader of the same batches without worker processes, so that none is shared with the training loader."""
    if isinstance(loader, Mapping | list | tuple):
        return (batch for batch, _, _ in CombinedLoader(loader, "max_size_cycle"))
    if type(loader) is not DataLoader:
        return loader
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        sizes = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        sampler = {} if isinstance(loader.dataset, IterableDataset) else {"sampler": loader.sampler}
    else:
        sizes, sampler = {}, {"batch_sampler": loader.batch_sampler}
    return DataLoader(loader.dataset, **sizes, **sampler, collate_fn=loader.collate_fn, generator=loader.generator)


@contextmanager
def _generators_restored(source: Any) -> Iterator[None]:
    """Restore the random generators owned by loaders, their samplers and datasets at the end."""
    restore = [_restoring(generator) for loader in _loaders(source) for generator in _generators_of(loader)]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _generators_of(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    owners = [loader, getattr(loader, "dataset", None), *samplers]
    return [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]


def _restoring(generator: Any) -> Callable[[], None]:
    """A function that restores the current state of a torch, Python or NumPy generator; no-op for other objects."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, numpy.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, numpy.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return lambda: None


@contextmanager
def predicting(trainer: Trainer) -> Iterator[None]:
    """Set the trainer's stage to `predict`, so that hooks that augment training batches leave these unchanged."""
    training, sanity, validating = trainer.training, trainer.sanity_checking, trainer.validating
    trainer.predicting = True
    try:
        yield
    finally:
        if training:
            trainer.training = True
        elif sanity:
            trainer.sanity_checking = True
        elif validating:
            trainer.validating = True


def calibration_forward(trainer: Trainer, module: LightningModule) -> Callable[[Any], Any]:
    """A function that prepares a batch as Lightning does for `predict_step`, and passes it to the method of the module
    that accepts it (see `ModelCall`)."""
    call = ModelCall(module)

    def forward(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        data_hooks = trainer.datamodule
        if data_hooks is not None and is_overridden("on_before_batch_transfer", data_hooks):
            batch = data_hooks.on_before_batch_transfer(batch, 0)
        else:
            batch = module.on_before_batch_transfer(batch, 0)
        return call(trainer.strategy.batch_to_device(batch))

    return forward


def checked_batches(
    trainer: Trainer,
    forward: Callable[[Any], Any],
    source: Iterable[Any] | None,
    samples: int | None,
    config: PruningConfig | None = None,
) -> tuple[list[Any], str]:
    """Like `calibration_batches`, and also sends one sample through the model to find errors early.

    Raises:
        CalibrationError: as `calibration_batches`, or if the sample fails; on all ranks if one rank fails.
        ConfigError: if the allocation of `config` needs logits or gradients that this model does not have.
    """
    with errors_on_all_ranks():
        batches, name = calibration_batches(trainer, source, samples)
        first = (split_samples(batches[0]) or batches)[0]
    module, precision = trainer.lightning_module, trainer.precision_plugin.predict_step_context()
    # `evaluating` comes last, as it turns off the cache of autocast, whose copies of weights have no gradients.
    with torch.no_grad(), precision, evaluating(module), isolate_rng():
        with errors_on_all_ranks():
            passes(module, lambda _: forward(first), count=1)
        if config is not None:
            check_sample(module, config, first, forward)
    return batches, name
