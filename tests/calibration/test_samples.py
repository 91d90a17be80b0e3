from __future__ import annotations

import pytest
import torch

from sparsefit.calibration.batches import regroup
from sparsefit.calibration.samples import count_samples, cut_batch, join_samples, split_samples, tensors_in


def image(height: int, width: int = 5) -> torch.Tensor:
    return torch.randn(3, height, width)


TOKENS = torch.ones(3, 7, dtype=torch.long)
BOXES = [{"boxes": torch.rand(count, 4), "labels": torch.ones(count, dtype=torch.long)} for count in (2, 5, 1)]
ALIKE = [{"boxes": torch.rand(2, 4), "labels": torch.ones(2, dtype=torch.long)} for _ in range(3)]

CUTTABLE = {
    "tensor": (torch.randn(3, 4), 3),
    "labelled": ((torch.randn(3, 4), torch.ones(3)), 3),
    "nested": ({"x": [torch.randn(3, 4), (torch.ones(3),)], "name": ["a", "b", "c"]}, 3),
    "images and boxes": ({"pixel_values": torch.randn(3, 3, 8, 8), "labels": BOXES}, 3),
    "lists of images and boxes": (((image(4), image(6), image(8)), tuple(BOXES)), 3),
    "as many boxes in each": ({"pixel_values": torch.randn(3, 3, 8, 8), "labels": ALIKE}, 3),
    "as many channels as images": ([[image(4), image(4), image(4)], BOXES], 3),
    "dicts alone": ([{"image": image(4), "id": torch.tensor(0)}, {"image": image(6), "id": torch.tensor(1)}], 2),
    "loaders": ([{"x": torch.randn(3, 4), "y": torch.ones(3)}, {"x": torch.randn(3, 4), "y": torch.ones(3)}], 3),
    "a name of all": ({"x": torch.randn(3, 4), "classes": ["cat", "dog"]}, 3),
}
WHOLE = {
    "patches": ({"pixel_values": torch.randn(48, 6), "image_grid_thw": torch.ones(3, 3), "input_ids": TOKENS}, 3),
    "patches, texts last": ({"pixel_values": torch.randn(48, 6), "grid": torch.ones(5, 3), "labels": TOKENS}, 3),
    "patches in a tuple": ((torch.randn(48, 6), TOKENS, TOKENS), 3),
    "a number for all": ({"x": torch.randn(3, 4), "scale": torch.tensor(2.0)}, 3),
    "numbers of whatever": ({"x": torch.randn(3, 4), "sizes": [1, 2, 3]}, 3),
}


@pytest.mark.parametrize("name", CUTTABLE)
def test_samples_are_counted_cut_and_put_together_again(name):
    batch, size = CUTTABLE[name]
    assert count_samples(batch) == size
    samples = split_samples(batch)
    assert [count_samples(sample) for sample in samples] == [1] * size
    assert [count_samples(cut_batch(batch, count)) for count in range(1, size + 1)] == [*range(1, size + 1)]
    joined = list(tensors_in(join_samples(samples)))
    assert all(torch.equal(one, other) for one, other in zip(joined, tensors_in(batch), strict=True))


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_cut_stays_whole(name):
    batch, size = WHOLE[name]
    assert count_samples(batch) == size
    assert split_samples(batch) is None
    assert cut_batch(batch, 1) is batch


def test_batches_without_tensors_are_not_joined():
    batches = [{"text": ["a", "b"]}, {"text": ["c", "d"]}]
    assert [batch.data for batch in regroup(batches, size=8)] == batches
