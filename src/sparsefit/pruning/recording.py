"""Statistics of the inputs of a model's prunable weights, taken once for each distinct input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefit.errors import CalibrationError
from sparsefit.pruning.calibration import MicroBatch
from sparsefit.pruning.ranks import from_all, is_distributed
from sparsefit.pruning.statistics import InputStatistics
from sparsefit.pruning.watching import Seen, fused_inputs, hooked
from sparsefit.pruning.weights import PrunableWeight


class Part(NamedTuple):
    """Rows of a weight (None: all of them) and the statistics of what they see."""

    rows: slice | None
    statistics: InputStatistics


def real_tokens(seen: Seen, batch: MicroBatch | None) -> tuple[Tensor, str | None]:
    """(tokens, in) inputs without the positions that are padding, and a note if these could not be told."""
    tokens = seen.tokens
    padding = batch.padding_mask if batch is not None else None
    if padding is None:
        return tokens, None
    # An expert's tokens come in an order of their own, even where it gets all of them.
    if len(tokens) != padding.numel() or seen.weight.index is not None:
        name, shape = seen.weight.name, tuple(seen.inputs.shape)
        return tokens, f"{name}: padding could not be told from tokens in inputs of shape {shape}"
    return tokens[padding.flatten().to(tokens.device)], None


def check_finite(norms: Tensor, seen: Seen, batch: MicroBatch | None) -> None:
    """Check the (in,) squared norms of one input.

    Raises:
        CalibrationError: naming the layer and the calibration batch.
    """
    if bool(norms.isfinite().all()):
        return
    origin = batch.origin if batch is not None else ()
    if origin and len(seen.inputs) % len(origin) == 0:  # samples one after the other, each alone or token by token
        finite = seen.inputs.float().square().isfinite().reshape(len(origin), -1).all(dim=1).tolist()
        origin = tuple(number for number, fine in zip(origin, finite, strict=True) if not fine)[:1] or origin
    batches = " or ".join(map(str, dict.fromkeys(origin))) or "?"
    raise CalibrationError(
        f"the inputs of {seen.weight.name} are NaN or infinite in calibration batch {batches}. The model was left as "
        "it was; look at that batch, or run the model in float32 or bfloat16 if it overflows in float16"
    )


class AllSeen(Exception):
    """Every watched layer has got its input: what the block still computes is of no use."""


class InputsDiverged(Exception):
    """Weights that saw the same inputs at first no longer do: their statistics must be kept apart from the start."""


@dataclass
class _Accumulator:
    statistics: InputStatistics
    events: int = 0


_Rows = tuple[int, int] | None
_Place = tuple[str, _Rows]  # a weight and which of its rows


class InputRecorder:
    """Collects statistics of the inputs of some weights while a model runs, once for each distinct input.

    q, k and v get one and the same tensor. Weights whose inputs are the same from their first on share one
    accumulator, so that there is one Gram matrix and not three. `apart` gives each its own; in a distributed run it is
    always so, as ranks that share differently could not add up.

    Args:
        weights: The weights to watch.
        kinds: The statistics to take: see `statistics.KINDS`.
        apart: No sharing.

    Attributes:
        notes: What could not be told, for the report.
    """

    def __init__(self, weights: Iterable[PrunableWeight], kinds: Iterable[str], apart: bool = False) -> None:
        self.weights, self.kinds = list(weights), tuple(kinds)
        self.apart = apart or is_distributed()
        self.notes: set[str] = set()
        self._batch: MicroBatch | None = None
        self._accumulators: dict[_Place, _Accumulator] = {}
        self._events: dict[_Place, int] = {}
        self._last: tuple[Seen, _Accumulator] | None = None
        self._called: list[int] = []  # layers, since the micro-batch began
        self._stops = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the inputs; all hooks are gone afterwards, whatever happens."""
        with hooked(self.weights, self.record), fused_inputs(self.weights, self.record):
            yield
        self._last = None

    def next_batch(self, batch: MicroBatch, may_stop: bool = False) -> None:
        """Say which micro-batch runs next.

        Args:
            batch: The micro-batch.
            may_stop: Whether `AllSeen` may be raised as soon as every layer has got its input; it is if each was called
                once, and once only, with the micro-batch before.
        """
        self._stops = may_stop and self._all_called_once()
        self._batch, self._last = batch, None
        self._called.clear()

    def _all_called_once(self) -> bool:
        layers = [id(layer) for weight in self.weights for layer in weight.layers]
        return sorted(self._called) == sorted(layers)

    def record(self, seen: Seen) -> None:
        """Take in the input of one weight.

        Raises:
            InputsDiverged: if it no longer is what another weight sees that shares the statistics.
            CalibrationError: if it is not finite.
            AllSeen: if it was the last one and no more of the model is needed: see `next_batch`.
        """
        self._called += [id(seen.layer)] if seen.layer is not None else []
        if self.apart and seen.rows is None and _is_packed_attention(seen.weight):
            for rows in _thirds(seen.weight):
                self._record_apart(seen._replace(rows=rows))
        elif self.apart:
            self._record_apart(seen)
        else:
            self._record_shared(seen)
        if self._stops and self._all_called_once():
            raise AllSeen

    def parts(self) -> dict[str, list[Part]]:
        """The statistics of every weight, added up over all ranks of a distributed run.

        Raises:
            InputsDiverged: see `record`.
        """
        if any(self._events[place] != accumulator.events for place, accumulator in self._accumulators.items()):
            raise InputsDiverged
        rows = self._rows_seen()
        return {weight.name: self._parts_of(weight, rows.get(weight.name, set())) for weight in self.weights}

    def _rows_seen(self) -> dict[str, set[_Rows]]:
        """The row ranges in which each weight was seen, on any rank."""
        found: dict[str, set[_Rows]] = {}
        for name, rows in set().union(*from_all(set(self._accumulators))):
            found.setdefault(name, set()).add(rows)
        return found

    def _parts_of(self, weight: PrunableWeight, seen: set[_Rows]) -> list[Part]:
        if {None} < seen:
            raise InputsDiverged
        ranges = [(0, weight.shape[0])] if None in seen else sorted(seen)
        bounds = [0, *(stop for _, stop in ranges)], [*(start for start, _ in ranges), weight.shape[0]]
        if bounds[0] != bounds[1]:
            # Never called, or some rows were not.
            return [Part(None, InputStatistics(weight.shape[1], weight.device))]
        parts = []
        for rows in [None] if None in seen else ranges:
            statistics = self._accumulator((weight.name, rows), weight).statistics
            if self.apart:
                statistics.reduce_over_ranks()
            parts.append(Part(slice(*rows) if rows else None, statistics))
        return _collapsed(parts)

    def _accumulator(self, place: _Place, weight: PrunableWeight) -> _Accumulator:
        if place not in self._accumulators:
            self._accumulators[place] = self._new(weight)
            self._events[place] = 0
        return self._accumulators[place]

    def _new(self, weight: PrunableWeight) -> _Accumulator:
        return _Accumulator(InputStatistics(weight.shape[1], weight.device, self.kinds))

    def _record_shared(self, seen: Seen) -> None:
        place = _place(seen)
        own = self._accumulators.get(place)
        if self._is_repeated(seen):
            shared = self._last[1]
            joins = own is None and shared.events == 1
            if joins or (own is shared and self._events[place] == shared.events - 1):
                self._accumulators[place], self._events[place] = shared, shared.events
                return
        own = self._accumulator(place, seen.weight)
        if own.events != self._events[place]:
            raise InputsDiverged
        self._add(own.statistics, seen)
        own.events += 1
        self._events[place] = own.events
        self._last = (seen, own)

    def _record_apart(self, seen: Seen) -> None:
        if not self._is_repeated(seen):
            once = self._new(seen.weight)
            self._add(once.statistics, seen)
            self._last = (seen, once)
        place = _place(seen)
        own = self._accumulator(place, seen.weight)
        own.statistics.merge(self._last[1].statistics)
        own.events += 1
        self._events[place] = own.events

    def _is_repeated(self, seen: Seen) -> bool:
        return self._last is not None and seen.same_input(self._last[0])

    def _add(self, statistics: InputStatistics, seen: Seen) -> None:
        tokens, note = real_tokens(seen, self._batch)
        if note:
            self.notes.add(note)
        check_finite(statistics.add(tokens), seen, self._batch)


def _place(seen: Seen) -> _Place:
    return seen.weight.name, (seen.rows.start, seen.rows.stop) if seen.rows else None


def _is_packed_attention(weight: PrunableWeight) -> bool:
    return weight.fused and weight.name.rpartition(".")[2] == "in_proj_weight"


def _thirds(weight: PrunableWeight) -> list[slice]:
    """The rows of query, key and value in a packed projection."""
    width = weight.shape[0] // 3
    return [slice(i * width, (i + 1) * width) for i in range(3)]


def _collapsed(parts: list[Part]) -> list[Part]:
    """One part for all rows where all have seen the same."""
    first = parts[0].statistics
    same = all(
        part.statistics is first or torch.equal(part.statistics["squared_norm"], first["squared_norm"])
        for part in parts[1:]
    )
    return [Part(None, first)] if same else parts
