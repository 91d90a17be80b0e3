from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import CLASSES, _own_cache, class_folders, corrupt, encoded, parquet, pixels, rows  # noqa: F401
from kornia.augmentation import RandomBrightness, RandomCrop, RandomHorizontalFlip
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image as Pillow
from torch import nn
from torch.utils.data import DistributedSampler
from transformers import BitImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

from sparsefit.callbacks import WandaPruning
from sparsefit.data import ImageDataModule
from sparsefit.errors import CalibrationError, ConfigError, DataError

PLAIN = {"image_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}  # leaves images as they are
SETTINGS = PLAIN | {"batch_size": 4, "calibration_samples": 5}


FIRST = {"input_data_format": "channels_first"}


def seen(loader):
    """The numbers of the pictures in each batch."""
    return [numbers(batch) for batch in loader]


def numbers(batch):
    return (batch["pixel_values"][:, 0, 0, 0] * 255).round().int().tolist()


def joined(batches):
    return [number for batch in batches for number in batch]


def all_pixels(loader):
    return torch.cat([batch["pixel_values"] for batch in loader])


@pytest.fixture
def twenty(tmp_path):
    return parquet(tmp_path, rows(20))


PROCESSORS = {
    "same size": ViTImageProcessorPil(size={"height": 20, "width": 20}),
    "larger": ViTImageProcessorPil(size={"height": 33, "width": 28}, resample=3),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 24}),
    "large convnext": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "resized and cropped": BitImageProcessorPil(size={"shortest_edge": 26}, crop_size={"height": 22, "width": 22}),
    "cropped beyond the image": BitImageProcessorPil(do_resize=False, crop_size={"height": 32, "width": 32}),
    "not normalised": ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False),
    "scaled otherwise": ViTImageProcessorPil(size={"height": 16, "width": 16}, rescale_factor=1 / 127.5),
    "one mean": ViTImageProcessorPil(size={"height": 20, "width": 20}, image_mean=0.4, image_std=0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_batches_are_what_the_processor_makes_of_each_image(tmp_path, processor, mode):
    sizes = [(20, 20), (20, 20), (30, 25), (20, 20), (24, 40)]
    if mode == "L":
        processor = type(processor).from_dict(processor.to_dict() | {"image_mean": [0.4], "image_std": [0.3]})
    images = [Pillow.fromarray(pixels(number, *size)).convert(mode) for number, size in enumerate(sizes)]
    processor.save_pretrained(tmp_path / "model")
    file = parquet(tmp_path, [encoded(image) for image in images])
    data = ImageDataModule(str(tmp_path / "model"), test_source=file, batch_size=3)
    batches = list(data.test_dataloader())
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2], [0, 1]]
    for batch, start in zip(batches, (0, 3), strict=True):
        assert set(batch) == {"pixel_values", "labels"}
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["labels"].dtype == torch.int64
        for image, value in zip(images[start:], batch["pixel_values"], strict=False):
            array = np.asarray(image)[None] if mode == "L" else np.asarray(image).transpose(2, 0, 1)
            alone = processor(array, **FIRST, do_convert_rgb=mode == "RGB", return_tensors="pt")["pixel_values"][0]
            assert torch.equal(value, alone)


def test_the_processor_is_saved_beside_a_model_as_it_was(tmp_path, twenty):
    data = ImageDataModule(None, twenty, **SETTINGS | {"mean": [0.1, 0.2, 0.3]})
    data.image_processor.save_pretrained(tmp_path / "model")
    again = ImageDataModule(str(tmp_path / "model"), twenty, calibration_samples=5)
    assert torch.equal(all_pixels(again.calibration_dataloader()), all_pixels(data.calibration_dataloader()))


def test_images_of_several_shapes_need_a_processor_that_makes_them_one(tmp_path):
    ViTImageProcessorPil(size={"shortest_edge": 10}).save_pretrained(tmp_path)
    file = parquet(tmp_path, [*rows(2), encoded(pixels(3, 8, 16))])
    for batch_size in (1, 3):
        data = ImageDataModule(str(tmp_path), test_source=file, batch_size=batch_size)
        with pytest.raises(DataError, match=r"image 0 of .* \(3, 10, 10\) and image 2 of .* \(3, 10, 20\).*crop"):
            list(data.test_dataloader())


@pytest.mark.parametrize(("channels", "kind"), [("RGB", "L"), ("L", "RGB"), ("L", "L"), ("RGB", "RGB")])
def test_images_take_the_channels_of_the_model(tmp_path, channels, kind):
    images = [Pillow.fromarray(pixels(number)).convert(kind) for number in range(4)]
    file = parquet(tmp_path, [encoded(image) for image in images])
    size = 3 if channels == "RGB" else 1
    plain = {"image_size": 8, "mean": [0.0] * size, "std": [1.0] * size}
    (batch,) = ImageDataModule(None, test_source=file, **plain).test_dataloader()
    expected = np.stack([np.asarray(image.convert(channels)).reshape(8, 8, size) for image in images])
    assert torch.equal(batch["pixel_values"], torch.tensor(expected.transpose(0, 3, 1, 2)) / 255)


def test_a_processor_of_other_channels_than_wanted_is_told(tmp_path, twenty):
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot take images of 1 channels: .*Set channels to RGB"):
        ImageDataModule(str(tmp_path), twenty, channels="L").setup("fit")


# Calibration


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


def test_too_few_images_to_calibrate_are_told_before_any_is_read(twenty, tmp_path):
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


# Training


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["pixel_values"].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch["labels"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


class Seen(Callback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(batch["pixel_values"].clone())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append(batch["pixel_values"].clone())


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(data, folder, checkpoint=None, every=2, **limits):
    callback = Seen()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = Trainer(callbacks=[callback, saver], **QUIET | limits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*more than 1 thread|.*Checkpoint directory|.*`training_step`")
        warnings.filterwarnings("error", message=".*dataloader is not resumable")
        trainer.fit(Model(), data, ckpt_path=checkpoint, weights_only=True)
    return callback


def order(callback):
    return [(batch[:, 0, 0, 0] * 255).round().int().tolist() for batch in callback.train]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_image_once_and_the_next_has_another_order(twenty, tmp_path, workers, monkeypatch):
    monkeypatch.setattr("sparsefit.data.image_batches._KEPT_BYTES", 0)
    data = ImageDataModule(None, twenty, num_workers=workers, **SETTINGS | {"batch_size": 3})
    assert len(data.train_dataloader()) == 7
    batches = order(fit(data, tmp_path, max_epochs=2))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 3, 3, 2] * 2
    first, second = joined(batches[:7]), joined(batches[7:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_goes_on_where_it_stopped(twenty, tmp_path, prefix, workers, monkeypatch):
    monkeypatch.setattr("sparsefit.data.image_batches._KEPT_BYTES", 0)

    def run(folder, checkpoint=None):
        data = ImageDataModule(None, prefix + twenty, num_workers=workers, shuffle_buffer=8, **SETTINGS)
        return order(fit(data, folder, checkpoint, max_epochs=3))

    whole = run(tmp_path)
    assert len(whole) == 15
    assert len({tuple(joined(whole[start : start + 5])) for start in (0, 5, 10)}) == 3
    assert all(sorted(joined(whole[start : start + 5])) == list(range(20)) for start in (0, 5, 10))
    for step in (2, 10, 12):  # within an epoch, at the end of one, within a later one
        assert run(tmp_path / "more", tmp_path / f"step={step}.ckpt") == whole[step:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 5}, "batch_size was 4 and is 5"),
        ({"seed": 9}, "seed was 0 and is 9"),
        ({"train_source": "{}[:19]"}, "train_source was"),
    ],
)
def test_a_run_on_other_images_is_not_gone_on_from(twenty, tmp_path, change, words):
    fit(ImageDataModule(None, twenty, **SETTINGS), tmp_path, max_epochs=1)
    settings = {"train_source": twenty} | SETTINGS | change
    settings["train_source"] = settings["train_source"].format(twenty)
    with pytest.raises(ConfigError, match=words):
        fit(ImageDataModule(None, **settings), tmp_path, tmp_path / "step=2.ckpt", max_epochs=1)


@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_out(twenty, prefix, world_size, monkeypatch):
    def epoch(rank):
        data = ImageDataModule(None, prefix + twenty, **SETTINGS)
        monkeypatch.setattr(data, "rank_and_world_size", lambda: (rank, world_size))
        loader = data.train_dataloader()
        assert prefix or isinstance(loader.sampler, DistributedSampler)  # so the Trainer leaves it as it is
        return seen(loader)

    hands = [epoch(rank) for rank in range(world_size)]
    assert len({tuple(map(len, hand)) for hand in hands}) == 1  # equally many batches: no rank waits for ever
    shared = joined(joined(hands))
    assert len(set(shared)) == len(shared) == 20 - 20 % world_size


@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize(("then", "now", "batches"), [(2, 1, 2), (1, 3, 2), (2, 3, 1)])
def test_other_ranks_share_out_what_is_left_of_an_epoch(twenty, prefix, then, now, batches, monkeypatch):
    def epoch(rank, ranks, state=None):
        data = ImageDataModule(None, prefix + twenty, **SETTINGS | {"batch_size": 2})
        monkeypatch.setattr(data, "rank_and_world_size", lambda: (rank, ranks))
        if state is not None:
            shared = data.share_anew(state, then)
            assert shared["counted"] == -(-batches * then // now)
            data.load_state_dict(shared)
        return seen(data.train_dataloader())

    before = joined(joined(epoch(rank, then)[:batches] for rank in range(then)))
    hands = [epoch(rank, now, {"epoch": 0, "batches": batches}) for rank in range(now)]
    assert len({tuple(map(len, hand)) for hand in hands}) == 1
    images = before + joined(joined(hands))
    assert len(set(images)) == len(images) == 20 - (20 - len(before)) % now


def test_an_epoch_of_which_no_batch_is_left_to_other_ranks_is_over(twenty, monkeypatch):
    data = ImageDataModule(None, twenty, **SETTINGS | {"batch_size": 3})
    monkeypatch.setattr(data, "rank_and_world_size", lambda: (0, 4))
    state = data.share_anew({"epoch": 2, "batches": 3}, 2)  # 18 images: 2 are left for 4 ranks
    assert (state["epoch"], state["batches"], state["before"]) == (3, 0, [])


def test_a_stream_of_several_files_gives_each_worker_its_own(tmp_path):
    for part in range(3):
        parquet(tmp_path, [encoded(pixels(10 * part + number)) for number in range(6)], f"train-{part}.parquet")
    whole = sorted(10 * part + number for part in range(3) for number in range(6))
    source = f"stream:{tmp_path}/train-*.parquet"
    for workers in (0, 2):
        data = ImageDataModule(None, source, test_source=source, num_workers=workers, test_images=7, **SETTINGS)
        assert sorted(joined(seen(data.train_dataloader()))) == whole
        assert len(set(joined(seen(data.test_dataloader())))) == 7


# Images that cannot be read


@pytest.fixture
def damaged(tmp_path):
    """Twenty images, of which 3, 7, 8 and 19 cannot be read."""
    images = rows(20)
    images[3] = {"bytes": corrupt("truncated"), "path": "cats/three.jpg"}
    images[7], images[8], images[19] = corrupt("garbage"), None, corrupt("empty")
    return parquet(tmp_path, images)


GOOD = sorted(set(range(20)) - {3, 7, 8, 19})


@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize("loader", ["train", "calibration", "val", "test"])
def test_a_corrupt_image_is_an_error_that_names_it(damaged, loader, prefix):
    source = f"{prefix}{damaged}[1:4]"
    data = ImageDataModule(None, source, None, source, source, **SETTINGS | {"calibration_samples": 3})
    name = r"image( 3)? of .*parquet\[1:4\] \(cats/three.jpg\) cannot be read: .*truncated.*set skip_corrupt"
    with pytest.raises(DataError, match=name):
        list(getattr(data, f"{loader}_dataloader")())


def test_a_corrupt_file_of_a_class_folder_is_named_in_a_worker_too(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsefit.data.image_batches._KEPT_BYTES", 0)
    folder = class_folders(tmp_path / "images", {"cat": 3, "dog": 3})
    Path(folder, "dog/4.png").write_bytes(corrupt("broken"))
    for workers in (0, 1):
        data = ImageDataModule(None, test_source=folder, num_workers=workers, **SETTINGS)
        with pytest.raises(DataError, match=r"images/dog/4.png cannot be read: "):
            list(data.test_dataloader())


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 2), (6, 0)])
@pytest.mark.filterwarnings("ignore:[1-4] images of")
def test_corrupt_images_are_skipped_and_counted_where_that_is_asked_for(
    damaged, prefix, batch_size, workers, monkeypatch
):
    monkeypatch.setattr("sparsefit.data.image_batches._KEPT_BYTES", 0 if workers else 2**30)
    data = ImageDataModule(
        None,
        prefix + damaged,
        test_source=prefix + damaged,
        skip_corrupt=True,
        num_workers=workers,
        **SETTINGS | {"batch_size": batch_size, "calibration_samples": 16},
    )
    names = r"4 images of .* cannot be read: image.* of .*; they were skipped"
    with pytest.warns(UserWarning, match=names):
        batches = list(data.test_dataloader())
    assert joined(map(numbers, batches)) == GOOD
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [number % 3 for number in GOOD]
    assert all(len(batch["labels"]) for batch in batches)
    with pytest.warns(UserWarning, match=names):
        assert set(joined(seen(data.train_dataloader()))) == set(GOOD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sorted(joined(seen(data.calibration_dataloader()))) == GOOD  # exactly as many as asked for
    data.hparams.calibration_samples = 17
    with pytest.raises(CalibrationError, match=r"draws 17 images .* has 16 that can be read"):
        list(data.calibration_dataloader())


def test_ranks_of_a_training_have_equally_many_batches_whatever_is_corrupt(damaged, monkeypatch):
    counts = []
    for rank in range(4):
        data = ImageDataModule(None, damaged, skip_corrupt=True, **SETTINGS | {"batch_size": 1})
        monkeypatch.setattr(data, "rank_and_world_size", lambda rank=rank: (rank, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = seen(data.train_dataloader())
        assert set(joined(batches)) <= set(GOOD)
        counts.append(len(batches))
    assert counts == [5] * 4


@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_where_no_image_can_be_read_skipping_is_no_way_out(tmp_path, prefix):
    file = parquet(tmp_path, [corrupt("garbage")] * 5)
    data = ImageDataModule(None, prefix + file, test_source=prefix + file, skip_corrupt=True, **SETTINGS)
    with pytest.raises(DataError, match=r"none of the 5 images|5 images of .* cannot be read: .*no other"):
        list(data.test_dataloader())


@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize("how", ["garbage", "empty"])
def test_what_is_wrong_with_an_image_is_said_in_words(tmp_path, how, prefix):
    source = prefix + parquet(tmp_path, [*rows(2), corrupt(how)])
    with pytest.raises(
        DataError, match=r"image 2 of .* cannot be read: it is empty, or no image of a kind that Pillow"
    ):
        list(ImageDataModule(None, test_source=source, **SETTINGS).test_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["train", "test"])
def test_a_stream_sliced_behind_its_end_is_told(twenty, loader, workers):
    source = f"stream:{twenty}[20:]"
    data = ImageDataModule(None, source, test_source=source, num_workers=workers, **SETTINGS)
    with pytest.raises(DataError, match=r"\[20:\] takes no image"):
        list(getattr(data, f"{loader}_dataloader")())


# Small data sets stay in memory


def test_images_are_decoded_once(tmp_path):
    folder = class_folders(tmp_path / "images", {"cat": 3, "dog": 2})
    data = ImageDataModule(None, folder, test_source=folder, num_workers=2, **SETTINGS)
    first = all_pixels(data.test_dataloader())
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    assert torch.equal(all_pixels(data.test_dataloader()), first)
    assert sorted(joined(seen(data.train_dataloader()))) == list(range(5))


# Augmentation


@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_augmentation_that_changes_nothing_leaves_the_processors_values(twenty, tmp_path, prefix):
    settings = SETTINGS | {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "image_size": 12}
    plain = fit(ImageDataModule(None, prefix + twenty, **settings), tmp_path, max_epochs=1)
    data = ImageDataModule(None, prefix + twenty, augmentation=[nn.Identity()], **settings)
    augmented = fit(data, tmp_path, max_epochs=1)
    for batch, expected in zip(augmented.train, plain.train, strict=True):
        assert batch.dtype == torch.float32
        torch.testing.assert_close(batch, expected, atol=1e-5, rtol=0)


def flips(batch, originals):
    """Which pictures came out flipped; raises where one is neither itself nor its mirror image."""
    result = []
    for image in batch:
        same = [torch.allclose(image, one, atol=1e-5) for one in originals]
        mirrored = [torch.allclose(image.flip(-1), one, atol=1e-5) for one in originals]
        assert sum(same) + sum(mirrored) == 1
        result.append(any(mirrored))
    return result


def test_training_images_are_augmented_and_no_others(twenty, tmp_path):
    def run(seed):
        seed_everything(seed, verbose=False)
        data = ImageDataModule(
            None, twenty, None, twenty, augmentation=[RandomHorizontalFlip(p=0.5)], **SETTINGS | {"std": [0.5] * 3}
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*share images")
            return data, fit(data, tmp_path, max_epochs=2)

    data, callback = run(1)
    originals = all_pixels(data.val_dataloader())
    flipped = joined([flips(batch, originals) for batch in callback.train])
    assert 10 <= sum(flipped) <= 30  # of 40
    assert all(not any(flips(batch, originals)) for batch in callback.val)
    assert not any(flips(all_pixels(data.calibration_dataloader()), originals))
    again, other = run(1)[1].train, run(2)[1].train
    assert all(map(torch.equal, callback.train, again))
    assert not all(map(torch.equal, callback.train, other))


def test_a_resumed_run_of_augmented_images_sees_the_same_pictures(twenty, tmp_path):
    def run(folder, checkpoint=None):
        data = ImageDataModule(None, twenty, augmentation=[RandomHorizontalFlip(p=1.0)], **SETTINGS)
        return fit(data, folder, checkpoint, max_epochs=2).train

    whole, resumed = run(tmp_path), run(tmp_path / "more", tmp_path / "step=4.ckpt")
    assert len(resumed) == 6
    assert all(map(torch.equal, resumed, whole[4:]))


def test_modules_see_values_between_0_and_1_in_their_order(twenty, tmp_path):
    class Spy(nn.Module):
        def forward(self, images):
            assert images.dtype == torch.float32
            assert 0 <= images.min() < 0.01
            assert 0.99 < images.max() <= 1
            assert images.shape[1:] == (3, 6, 6)
            return torch.ones_like(images)

    augmentation = [RandomCrop((6, 6)), Spy(), RandomBrightness((0.5, 0.5), p=1.0)]
    settings = SETTINGS | {"batch_size": 20, "mean": [0.5] * 3, "std": [2.0] * 3}
    callback = fit(ImageDataModule(None, twenty, augmentation=augmentation, **settings), tmp_path, max_epochs=1)
    torch.testing.assert_close(callback.train[0], torch.zeros(20, 3, 6, 6))  # (1 - 0.5 - 0.5) / 2


def test_augmented_images_take_the_precision_of_the_training(twenty, tmp_path):
    data = ImageDataModule(None, twenty, augmentation=[nn.Identity()], **SETTINGS)
    callback = fit(data, tmp_path, max_epochs=1, precision="bf16-true")
    assert {batch.dtype for batch in callback.train} == {torch.bfloat16}


def test_calibration_is_augmented_only_if_asked_for_and_then_always_alike(twenty):
    plain = ImageDataModule(None, twenty, **SETTINGS)
    data = ImageDataModule(
        None, twenty, augmentation=[RandomHorizontalFlip(p=0.5)], calibration_augmented=True, **SETTINGS
    )
    originals = all_pixels(plain.calibration_dataloader())
    torch.manual_seed(5)
    list(plain.calibration_dataloader())
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = all_pixels(data.calibration_dataloader())
    assert torch.equal(torch.rand(3), expected)  # no draw is taken from the training
    assert torch.equal(all_pixels(data.calibration_dataloader()), first)
    assert 0 < sum(flips(first, originals)) < 5


def test_a_configuration_file_lists_the_augmentation(twenty, tmp_path):
    from jsonargparse import ArgumentParser

    file = tmp_path / "data.yaml"
    file.write_text(
        f"""
data:
  class_path: sparsefit.data.ImageDataModule
  init_args:
    train_source: {twenty}
    image_size: 8
    mean: [0.5, 0.5, 0.5]
    std: [0.5, 0.5, 0.5]
    calibration_samples: 5
    augmentation:
      - class_path: kornia.augmentation.RandomHorizontalFlip
        init_args: {{p: 1.0}}
      - class_path: kornia.augmentation.RandomCrop
        init_args: {{size: [8, 8], padding: 2}}
"""
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(ImageDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args(["--config", str(file)])).data
    assert [type(module) for module in data.augmentation] == [RandomHorizontalFlip, RandomCrop]
    assert "RandomHorizontalFlip(p=1.0" in data.hparams.augmentation[0]
    assert len(fit(data, tmp_path, max_epochs=1).train) == 1


# Evaluation


def test_limits_draw_from_the_whole_source(tmp_path):
    folder = class_folders(tmp_path / "images", {"cat": 20, "dog": 20})
    data = ImageDataModule(None, None, None, folder, folder, val_images=10, test_images=99, **SETTINGS)
    drawn = joined(seen(data.val_dataloader()))
    assert len(set(drawn)) == 10
    assert min(drawn) < 20 <= max(drawn)
    assert drawn == joined(seen(data.val_dataloader()))
    assert sorted(joined(seen(data.test_dataloader()))) == list(range(40))


def test_batches_of_evaluation_have_their_own_size(twenty):
    data = ImageDataModule(None, None, None, twenty, twenty, evaluation_batch_size=15, **SETTINGS)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert [len(batch) for batch in seen(loader)] == [15, 5]
    assert ImageDataModule(None, twenty, **SETTINGS).val_dataloader() == []


def test_the_trainer_may_put_its_own_sampler_into_a_loader(twenty):
    data = ImageDataModule(None, test_source=twenty, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = Trainer(**QUIET).predict(Model(), data.test_dataloader())
    assert torch.cat(labels).tolist() == [number % 3 for number in range(20)]


# Settings


def test_classes_are_named_and_counted(tmp_path, twenty):
    data = ImageDataModule(None, twenty, **SETTINGS)
    assert data.class_names == CLASSES
    assert data.num_classes == 3
    plain = parquet(tmp_path, rows(4), "plain.parquet", labels=[0, 6, 2, 1], names=None)
    data = ImageDataModule(None, plain, **SETTINGS)
    assert data.class_names is None
    assert data.num_classes == 7
    assert ImageDataModule(None, f"stream:{plain}", **SETTINGS).num_classes is None


def test_sources_of_other_classes_are_told(tmp_path, twenty):
    for names, message in ((["cat", "dog", "emu"], "they differ in emu, owl"), (CLASSES[::-1], "their order differs")):
        other = parquet(tmp_path, rows(5), "other.parquet", names=names)
        with pytest.raises(DataError, match=f"3 classes and .* 3, so the same label means another class; {message}"):
            ImageDataModule(None, twenty, test_source=other, **SETTINGS).setup("fit")


def test_training_and_testing_on_the_same_images_is_told(twenty):
    with pytest.warns(UserWarning, match="train_source and test_source share images"):
        ImageDataModule(None, f"{twenty}[:15]", test_source=f"{twenty}[14:]", **SETTINGS).setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageDataModule(None, f"{twenty}[:15]", test_source=f"{twenty}[15:]", **SETTINGS).setup("fit")


def test_a_missing_source_is_named(twenty):
    with pytest.raises(ConfigError, match="ImageDataModule has no test_source: name the images"):
        ImageDataModule(None, twenty, **SETTINGS).setup("test")
    with pytest.raises(DataError, match="there is no file"):
        ImageDataModule(None, twenty, test_source="no.parquet", **SETTINGS).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_images": -1}, "val_images is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"channels": "grey"}, 'use "auto", "RGB" or "L"'),
        ({"mean": None}, "all of image_size, mean and std"),
        ({"mean": [0.5]}, "give 3 numbers each"),
        ({"std": [1.0, 0.0, 1.0]}, "no std of 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"processor": "some/model"}, "processor and image_size are both set"),
        ({"calibration_augmented": True}, "there is no augmentation"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageDataModule(**{"train_source": "images.parquet"} | PLAIN | settings)


def test_a_processor_that_cannot_be_loaded_is_told(tmp_path, twenty, monkeypatch):
    monkeypatch.setattr("sparsefit.modules.loading.hub_problem", lambda: "the hub cannot be reached")
    (tmp_path / "models/vit").mkdir(parents=True)
    (tmp_path / "models/vit/preprocessor_config.json").write_text("{")
    for name, message in (
        (f"{tmp_path}/models", r"holds no preprocessor_config.json.* Did you mean .*models/vit\?"),
        (f"{tmp_path}/model", r"there is no folder .*Did you mean .*models\?"),
        (f"{tmp_path}/models/vit", "cannot load the image processor in .*Check that the folder is complete"),
        ("some/vit", r"the hub cannot be reached.*`hf download some/vit"),
    ):
        with pytest.raises(ConfigError, match=f"{message}.* Or set image_size, mean and std"):
            ImageDataModule(name, twenty).setup("fit")


def test_real_images(shared_data, tmp_path):
    file = f"{shared_data}/cifar10/test.parquet"
    data = ImageDataModule(None, f"{file}[:600]", test_source=f"{file}[9000:]", calibration_samples=256, **PLAIN)
    assert " ".join(data.class_names) == "airplane automobile bird cat deer dog frog horse ship truck"
    images = all_pixels(data.calibration_dataloader())
    assert images.shape == (256, 3, 8, 8)
    assert 0.3 < images.mean() < 0.6
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 1000
