"""Which images `ImageDataModule` draws for calibration."""

from __future__ import annotations

import pytest
import torch
from image_files import CLASSES, _own_cache, _twenty, encoded, parquet, pixels  # noqa: F401
from image_runs import QUIET, SETTINGS, Model, fit, joined, seen
from lightning.pytorch import Trainer

from sparsefit.callbacks import WandaPruning
from sparsefit.data import ImageDataModule
from sparsefit.errors import CalibrationError


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_calibration_draws_without_replacement_and_repeats_with_its_seed(twenty, workers, monkeypatch):
    monkeypatch.setattr("sparsefit.data.image_batches._KEPT_BYTES", 0 if workers else 2**30)

    def drawn(seed, batch_size=3):
        data = ImageDataModule(
            None, twenty, seed=seed, calibration_batch_size=batch_size, num_workers=workers, **SETTINGS
        )
        return joined(seen(data.calibration_dataloader()))

    assert len(set(drawn(1))) == len(drawn(1)) == 5
    assert drawn(1) == drawn(1) == drawn(1, batch_size=4)
    assert drawn(1) != drawn(2)


def test_ranks_calibrate_on_the_same_images(twenty, monkeypatch):
    data = ImageDataModule(None, twenty, **SETTINGS)
    alone = seen(data.calibration_dataloader())
    monkeypatch.setattr(data, "rank_and_world_size", lambda: (1, 2))
    assert seen(data.calibration_dataloader()) == alone


def test_calibration_on_another_source(tmp_path, twenty):
    others = parquet(tmp_path, [encoded(pixels(number)) for number in range(30, 36)], "others.parquet")
    data = ImageDataModule(None, twenty, others, **SETTINGS)
    assert min(joined(seen(data.calibration_dataloader()))) >= 30
    assert ImageDataModule(None, calibration_source=others, **SETTINGS).class_names == CLASSES


def test_too_few_images_to_calibrate_are_reported_before_any_is_read(twenty, tmp_path):
    data = ImageDataModule(None, twenty, **SETTINGS | {"calibration_samples": 21})
    message = "calibration draws 21 images .* has 20: set data.init_args.calibration_samples .*Pruning's own"
    with pytest.raises(CalibrationError, match=message):
        data.calibration_dataloader()
    assert len(fit(data, tmp_path, max_epochs=1).train) == 5  # which does not calibrate
    pruning = WandaPruning(granularity="layer", calibration_samples=3)
    model = Model()
    weight = model.layer.weight.detach().clone()
    with pytest.raises(CalibrationError, match=message):
        Trainer(callbacks=[pruning], max_steps=0, enable_checkpointing=False, **QUIET).fit(model, data)
    assert torch.equal(model.layer.weight, weight)
    streamed = ImageDataModule(None, f"stream:{twenty}", **SETTINGS | {"calibration_samples": 21})
    with pytest.raises(CalibrationError, match=message):
        list(streamed.calibration_dataloader())


def test_a_stream_calibrates_on_exactly_the_samples(twenty):
    def drawn(seed):
        data = ImageDataModule(None, f"stream:{twenty}", seed=seed, calibration_batch_size=2, **SETTINGS)
        return seen(data.calibration_dataloader())

    assert [len(batch) for batch in drawn(0)] == [2, 2, 1]
    assert len(set(joined(drawn(0)))) == 5
    assert drawn(0) == drawn(0) != drawn(1)
