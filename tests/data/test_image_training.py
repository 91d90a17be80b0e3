"""The order of training images in `ImageDataModule`: epochs, resumed runs, ranks and workers."""

from __future__ import annotations

import pytest
from image_files import _own_cache, _twenty, encoded, parquet, pixels  # noqa: F401
from image_runs import SETTINGS, fit, joined, order, seen
from torch.utils.data import DistributedSampler

from sparsefit.data import ImageDataModule
from sparsefit.errors import ConfigError


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


# Resumed runs


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_continues_where_it_stopped(twenty, tmp_path, prefix, workers, monkeypatch):
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
def test_a_run_on_other_images_is_not_resumed(twenty, tmp_path, change, words):
    fit(ImageDataModule(None, twenty, **SETTINGS), tmp_path, max_epochs=1)
    settings = {"train_source": twenty} | SETTINGS | change
    settings["train_source"] = settings["train_source"].format(twenty)
    with pytest.raises(ConfigError, match=words):
        fit(ImageDataModule(None, **settings), tmp_path, tmp_path / "step=2.ckpt", max_epochs=1)


# Ranks and workers


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
