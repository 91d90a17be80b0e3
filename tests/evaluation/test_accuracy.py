from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsefit.errors import ConfigError, DataError, SparsefitError
from sparsefit.evaluation import accuracy


class Scores(nn.Module):
    """Gives the first row of each image as its logits; dropout would change them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)

    def forward(self, images):
        return self.dropout(images[:, 0, 0] * self.scale)


def batches(*sizes, classes=9, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(size, 3, 2, classes, generator=random),
            "labels": torch.randint(classes, (size,), generator=random),
        }
        for size in sizes
    ]


def reference(batches):
    """Image by image: the rank of the label's score."""
    ranks = []
    for batch in batches:
        for image, label in zip(batch["pixel_values"].tolist(), batch["labels"].tolist(), strict=True):
            scores = image[0][0]
            ranks.append(sorted(scores, reverse=True).index(scores[label]))
    return {
        "accuracy": sum(rank < 1 for rank in ranks) / len(ranks),
        "top5_accuracy": sum(rank < 5 for rank in ranks) / len(ranks),
    }


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 40])
@pytest.mark.parametrize("sizes", [(50,), (1, 20, 7)])
def test_it_agrees_with_a_slow_reference(sizes, classes):
    data = batches(*sizes, classes=classes)
    found = accuracy(Scores(), data)
    assert found == pytest.approx(reference(data))
    if classes <= 5:
        assert found["top5_accuracy"] == 1


def test_modes_are_put_back_and_progress_is_reported():
    model, done = Scores(), []
    model.dropout.eval()
    accuracy(model, iter(batches(3, 3)), done.append)
    assert done == [1, 2]
    assert model.training
    assert not model.dropout.training


def test_there_must_be_images():
    with pytest.raises(DataError, match="no images to evaluate on"):
        accuracy(Scores(), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(value):
    data = batches(4, 4)
    data[1]["pixel_values"][2, 0, 0, 3] = value
    with pytest.raises(SparsefitError, match="logits of 1 of 4 images of batch 2 are not finite"):
        accuracy(Scores(), data)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 9]), r"label 9, and the model's head has 9 classes, 0 to 8: give .* at least 10 classes"),
        (torch.tensor([-1, 2]), "label -1; .* leave them out"),
        (torch.tensor([0.0, 1.0]), "one whole number"),
        (torch.zeros(2, 9, dtype=torch.long), "one whole number"),
        (torch.tensor([1]), "for 2 images"),
    ],
)
def test_labels_that_cannot_be(labels, message):
    with pytest.raises(DataError, match=message):
        accuracy(Scores(), [batches(2)[0] | {"labels": labels}])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixels": torch.zeros(2, 3, 2, 9)}, "no images: it is a mapping with 'pixels'"),
        ({"image": torch.zeros(2, 3, 2, 9)}, "no labels: it is a mapping with 'image'"),
        ((torch.zeros(2, 3, 2, 9),), "no labels: it is a tuple"),
        ({"images": torch.zeros(2, 3, 2, 9), "label": ["a", "b"]}, "no labels"),
    ],
)
def test_batches_that_lack_a_part(batch, message):
    with pytest.raises(DataError, match=message):
        accuracy(Scores(), [batch])


def test_a_head_of_one_class():
    with pytest.raises(ConfigError, match="1 class"):
        accuracy(Scores(), batches(2, classes=1))
