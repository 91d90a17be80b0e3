from __future__ import annotations

from itertools import chain

import pytest
import torch

from sparsefit.data.packing import crop, deal, draw_crops, pack, shuffled
from sparsefit.errors import CalibrationError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [1, 3, 7, 50, 1000])
@pytest.mark.parametrize("sizes", [[5, 1, 9, 2], [100], [0, 0, 3], [], [7, 7, 7]])
@pytest.mark.parametrize("end", [None, 99_999])
def test_windows_are_the_closed_documents_joined_and_cut(length, sizes, end):
    documents = [[1000 * number + place for place in range(size)] for number, size in enumerate(sizes)]
    stream = [token for document in documents for token in document + ([] if end is None else [end])]
    expected = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    assert [window.tolist() for window in pack(documents, length, end)] == expected


def test_a_document_that_is_closed_already_is_not_closed_twice():
    assert [window.tolist() for window in pack([[1, 9], [2]], 4, end=9)] == [[1, 9, 2, 9]]


def test_packing_reads_no_more_than_it_yields():
    read = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield [number] * 10

    windows = pack(documents(), 25, end=None)
    next(windows)
    assert len(read) == 3


def test_crops_are_runs_of_the_document_at_every_place():
    starts = set()
    random = generator()
    for _ in range(300):
        window = crop(range(8), 5, random)
        assert window.dtype == torch.int64
        assert window.tolist() == list(range(int(window[0]), int(window[0]) + 5))
        starts.add(int(window[0]))
    assert starts == {0, 1, 2}  # as the reference draws: the last start would need a document one token longer


def test_only_documents_of_more_than_the_length_are_cropped():
    documents = [("equal", range(4)), ("long", range(5)), ("short", range(1)), ("longer", range(50))]
    drawn = draw_crops(documents, 2, 4, generator())
    assert [name for name, _ in drawn] == ["long", "longer"]
    assert all(len(window) == 4 for _, window in drawn)


def test_too_few_long_documents_are_counted():
    documents = [(number, range(4 + number % 2)) for number in range(10)]
    with pytest.raises(CalibrationError, match=r"5 of 10 documents have more than sequence_length=4") as caught:
        draw_crops(documents, 6, 4, generator())
    assert 'calibration="pack"' in str(caught.value)


@pytest.mark.parametrize("buffer_size", [1, 3, 100])
def test_shuffling_keeps_every_item_and_repeats_with_its_seed(buffer_size):
    first = list(shuffled(range(40), buffer_size, generator(1)))
    assert sorted(first) == list(range(40))
    assert first == list(shuffled(range(40), buffer_size, generator(1)))
    assert (first != list(shuffled(range(40), buffer_size, generator(2)))) == (buffer_size > 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_dealing_gives_each_rank_as_many_and_nothing_twice(world_size):
    hands = [list(deal(range(22), rank, world_size)) for rank in range(world_size)]
    assert {len(hand) for hand in hands} == {22 // world_size}
    assert sorted(chain(*hands)) == list(range(22 // world_size * world_size))
