"""The samples of a batch of nested tensors, mappings and lists: counting, splitting and joining them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_MAIN = ("input_ids", "inputs_embeds", "attention_mask", "labels", "label", "targets", "target")


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, however its mappings, lists and tuples are nested.

    >>> list(tensors_in({"text": "hello", "ids": [torch.tensor(1), (torch.tensor(2),)]}))
    [tensor(1), tensor(2)]
    """
    if isinstance(batch, Tensor):
        yield batch
    for value in _members(batch):
        yield from tensors_in(value)


def numbers_in(batch: Any) -> int:
    """The number of elements in all tensors of a batch.

    >>> numbers_in({"ids": torch.zeros(2, 3), "text": "hello"})
    6
    """
    return sum(tensor.numel() for tensor in tensors_in(batch))


def map_tensors(function: Callable[..., Tensor], *batches: Any) -> Any:
    """Apply a function to the corresponding tensors of batches with one structure; other values are those of the first.

    >>> map_tensors(torch.add, {"ids": torch.tensor(1), "text": "a"}, {"ids": torch.tensor(2), "text": "b"})
    {'ids': tensor(3), 'text': 'a'}
    """
    first = batches[0]
    if isinstance(first, Tensor):
        return function(*batches)
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *(batch[key] for batch in batches)) for key in first}
    if isinstance(first, list | tuple):
        return _like(first, [map_tensors(function, *values) for values in zip(*batches, strict=True)])
    return first


def count_samples(batch: Any) -> int:
    """How many samples a batch holds.

    That is the length of a list with one mapping per sample, or else the first dimension of the tensors. If tensors
    differ in it, as image patches and texts do, `input_ids`, masks and labels decide, or else the majority.

    >>> count_samples({"pixel_values": torch.zeros(40, 12), "input_ids": torch.ones(2, 9, dtype=torch.long)})
    2
    >>> count_samples(([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], [{"boxes": torch.zeros(5, 4)}, {}]))
    2
    """
    if (listed := _listed(batch)) is not None:
        return listed
    tensors = [tensor for tensor in tensors_in(batch) if tensor.ndim]
    if isinstance(batch, Mapping) and not _agree(tensors):
        for key in _MAIN:
            if isinstance(batch.get(key), Tensor) and batch[key].ndim:
                return len(batch[key])
    # Tokens, masks and labels.
    texts = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.ndim <= 2]
    first = Counter(len(tensor) for tensor in (tensors if _agree(tensors) else texts or tensors))
    return first.most_common(1)[0][0] if first else 1


def split_samples(batch: Any) -> list[Any] | None:
    """Split a batch into batches of one sample. None if it has no tensors or an ambiguous structure: its tensors differ
    in their first dimension, one is a scalar, or a list of numbers might belong to each sample or to the whole batch.

    >>> split_samples({"x": torch.tensor([[1], [2]]), "text": ["a", "b"]})
    [{'x': tensor([[1]]), 'text': ['a']}, {'x': tensor([[2]]), 'text': ['b']}]
    >>> split_samples({"patches": torch.zeros(12, 4), "grids": torch.ones(2, 3)}) is None
    True
    """
    size, listed = count_samples(batch), _listed(batch) is not None
    if not any(True for _ in tensors_in(batch)) or not _can_be_split(batch, size, listed):
        return None
    return [_cut(batch, size, listed, index, index + 1) for index in range(size)]


def cut_batch(batch: Any, size: int) -> Any:
    """The first `size` samples of a batch; all of them if it cannot be split.

    >>> cut_batch([torch.zeros(4, 2), torch.zeros(4)], 3)[0].shape
    torch.Size([3, 2])
    """
    whole, listed = count_samples(batch), _listed(batch) is not None
    return _cut(batch, whole, listed, 0, size) if _can_be_split(batch, whole, listed) else batch


def join_samples(samples: list[Any]) -> Any:
    """Join batches of one sample, from `split_samples` and of one structure, into one batch.

    >>> join_samples([{"x": torch.tensor([1]), "text": ["a"]}, {"x": torch.tensor([2]), "text": ["b"]}])
    {'x': tensor([1, 2]), 'text': ['a', 'b']}
    """
    return samples[0] if len(samples) == 1 else _join(samples, _listed(samples[0]) is not None)


def _join(samples: list[Any], listed: bool) -> Any:
    first = samples[0]
    if isinstance(first, Tensor):
        return torch.cat(samples)
    if isinstance(first, Mapping):
        return {key: _join([sample[key] for sample in samples], listed) for key in first}
    if _one_each(first, 1, listed):
        return type(first)(value for sample in samples for value in sample)
    if isinstance(first, list | tuple):
        return _like(first, [_join(list(values), listed) for values in zip(*samples, strict=True)])
    return first


def _cut(batch: Any, size: int, listed: bool, start: int, stop: int) -> Any:
    """Some samples of a batch of `size` that can be split."""
    if isinstance(batch, Tensor) or _one_each(batch, size, listed):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: _cut(value, size, listed, start, stop) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return _like(batch, [_cut(value, size, listed, start, stop) for value in batch])
    return batch


def _can_be_split(batch: Any, size: int, listed: bool) -> bool:
    if isinstance(batch, Tensor):
        return batch.ndim > 0 and len(batch) == size
    if _one_each(batch, size, listed):
        return True
    if isinstance(batch, list | tuple) and len(batch) == size and not any(True for _ in tensors_in(batch)):
        return False
    return all(_can_be_split(value, size, listed) for value in _members(batch))


def _one_each(value: Any, size: int, listed: bool) -> bool:
    """Whether this is a list with one item for each of `size` samples: texts or, if the batch is `listed`, mappings or
    tensors. Other lists of tensors are parts of the batch."""
    if not isinstance(value, list | tuple) or len(value) != size or hasattr(value, "_fields"):
        return False
    kinds = (Mapping, Tensor) if listed else ()
    return any(all(isinstance(each, kind) for each in value) for kind in (str, *kinds))


def _listed(batch: Any) -> int | None:
    """The number of samples if a list holds one mapping for each, else None. It does if another tensor or list has the
    same length, or if the tensors in the mappings differ in their first dimension. (If neither is the case, the
    mappings are batches of several loaders.)"""
    for found in _lists(batch):
        if found and all(isinstance(each, Mapping) for each in found):
            rest = [value for value in _lists(batch) if value is not found and value is not batch]
            rest += [tensor for tensor in _tensors_outside(batch, found) if tensor.ndim]
            if any(len(value) == len(found) for value in rest) or not _agree(list(tensors_in(found))):
                return len(found)
    return None


def _lists(batch: Any) -> Iterator[Any]:
    if isinstance(batch, list | tuple):
        yield batch
    for value in _members(batch):
        yield from _lists(value)


def _tensors_outside(batch: Any, left_out: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    for value in _members(batch) if batch is not left_out else ():
        yield from _tensors_outside(value, left_out)


def _agree(tensors: list[Tensor]) -> bool:
    return all(tensor.ndim for tensor in tensors) and len({len(tensor) for tensor in tensors}) <= 1


def _members(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    return batch if isinstance(batch, list | tuple) else ()


def _like(first: list[Any] | tuple[Any, ...], values: list[Any]) -> Any:
    return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
