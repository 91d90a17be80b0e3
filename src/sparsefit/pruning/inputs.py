"""Collecting the statistics of what weights see while a model, or one of its blocks, runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sparsefit.errors import CalibrationError
from sparsefit.pruning.calibration import MicroBatch
from sparsefit.pruning.finite import check_finite
from sparsefit.pruning.groups import Part, Parts
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.ranks import errors_on_all_ranks, from_all, is_distributed
from sparsefit.pruning.statistics import InputStatistics, added_up
from sparsefit.pruning.watch import Rows, Seen, version_of, watching

Key = tuple[str, Rows]  # a weight and which of its rows


def collect(
    weights: Sequence[PrunableWeight],
    kinds: Iterable[str],
    data: Sequence[MicroBatch],
    run: Callable[[int], object],
    note: Callable[[str], None],
    until: Mapping[Key, int] | None = None,
) -> Parts:
    """The statistics of what some weights see while a model, or one of its blocks, runs over the calibration data.

    Args:
        weights: The weights.
        kinds: What to take: names from `statistics.KINDS`.
        data: The micro-batches.
        run: Runs the one of that number. What it would still compute once all weights have got their input is of no
            use to anybody if `until` is given.
        note: Takes sentences for the report.
        until: How often a pass has been seen to use each weight: where that is once each, a pass ends as soon as
            all have been.

    Raises:
        CalibrationError: if an input is not finite; names the layer and the calibration batch.

    >>> import torch
    >>> from sparsefit.pruning.layers import matrices_of
    >>> layer, data = torch.nn.Linear(2, 3), [MicroBatch(torch.tensor([[3.0, 4.0]]), origin=(0,))]
    >>> parts = collect(matrices_of(layer), (), data, lambda number: layer(data[number].data), note=print)
    >>> parts["weight"][0].statistics["squared_norm"]
    tensor([ 9., 16.])
    """
    with errors_on_all_ranks():
        collector = InputCollector(weights, kinds, until)
        try:
            _run_all(collector, data, run)
        except _ChangedInPlace as changed:
            note(f"{changed}; the statistics were taken again, for each weight by itself")
            collector = InputCollector(weights, kinds, until, share=False)
            _run_all(collector, data, run)
        if not collector.all_finite():
            checking = InputCollector(weights, ("squared_norm",), until, share=False, check=True)
            _run_all(checking, data, run)
            raise CalibrationError(
                "the inputs of the model's layers are finite one by one, but their squares add up to more than float32 "
                "holds. The model was left as it was; look at the calibration data, or scale it down"
            )
    for sentence in sorted(collector.notes):
        note(sentence)
    return collector.parts()


def _run_all(collector: InputCollector, data: Sequence[MicroBatch], run: Callable[[int], object]) -> None:
    with watching(collector.weights, collector.record):
        for number, batch in enumerate(data):
            collector.next_batch(batch)
            try:
                run(number)
            except AllSeen:
                continue
        collector.settle()


class _ChangedInPlace(Exception):
    """An input that is shared is no longer what it was; the message says whose."""


class AllSeen(Exception):
    """Every watched weight has got its input: what the block still computes is of no use."""


@dataclass
class _Shared:
    """What some rows of weights have all seen: the members, and those to which the next input has come already."""

    members: list[Key]
    statistics: InputStatistics
    inputs: int = 0
    pending: Seen | None = None
    arrived: list[Key] = field(default_factory=list)


class InputCollector:
    """Collects statistics while weights are watched, once for each distinct input.

    Weights whose first input is the same tensor share. From then on an input is added once it has come to all of
    them. If it comes to some and not to others they part: what they had seen until then was the same for all.

    Args:
        weights: The weights that are watched.
        kinds: The statistics to take.
        until: See `collect`.
        share: Whether weights share at all.
        check: Look at each input as it comes, to name the one that is not finite.

    Attributes:
        notes: What could not be told, for the report.
    """

    def __init__(
        self,
        weights: Iterable[PrunableWeight],
        kinds: Iterable[str],
        until: Mapping[Key, int] | None = None,
        share: bool = True,
        check: bool = False,
    ) -> None:
        self.weights, self.kinds = list(weights), kinds
        self._share, self._check = share, check
        self.notes: set[str] = set()
        self._batch: MicroBatch | None = None
        self._shared: dict[Key, _Shared] = {}
        self._last: tuple[Seen, _Shared] | None = None
        once = until is not None and all(count == 1 for count in until.values())
        self._until = set(until) if once and {name for name, _ in until} == {w.name for w in self.weights} else None
        self._waiting: set[Key] | None = None

    def next_batch(self, batch: MicroBatch) -> None:
        """Say which micro-batch runs next."""
        self.settle()
        self._batch, self._last = batch, None
        batch.begin()
        self._waiting = None if self._until is None else set(self._until)

    def record(self, seen: Seen) -> None:
        """Take in the input of one weight.

        Raises:
            AllSeen: if it was the last one and no more is needed.
            CalibrationError: if it is not finite and is to be checked.
        """
        if self._batch is not None:  # what is padding shows now: an input that is shared is added later
            seen = seen._replace(real=self._batch.real_rows(seen))
        key = (seen.weight.name, seen.rows)
        shared = self._shared.get(key)
        if shared is None:
            self._begin(key, seen)
        else:
            self._go_on(shared, key, seen)
        if self._waiting is not None:
            self._waiting.discard(key)
            if not self._waiting:
                raise AllSeen

    def _begin(self, key: Key, seen: Seen) -> None:
        """The first input of a weight: it shares with those before it that have seen this one and no other."""
        if self._share and self._last and seen.same_input(self._last[0]) and self._last[1].inputs == 1:
            shared = self._last[1]
            shared.members.append(key)
        else:
            shared = _Shared([key], InputStatistics(seen.weight.shape[1], seen.weight.device, self.kinds))
            self._add(shared, seen)
        self._shared[key] = shared

    def _go_on(self, shared: _Shared, key: Key, seen: Seen) -> None:
        if shared.pending is not None and (key in shared.arrived or not seen.same_input(shared.pending)):
            self._divide(shared)
            shared = self._shared[key]
        shared.pending = seen
        shared.arrived.append(key)
        if len(shared.arrived) == len(shared.members):
            self._complete(shared)

    def _complete(self, shared: _Shared) -> None:
        seen, shared.pending, shared.arrived = shared.pending, None, []
        self._add(shared, seen)

    def _divide(self, shared: _Shared) -> None:
        """Part those to which the pending input has come from those to which it has not."""
        rest = [key for key in shared.members if key not in shared.arrived]
        if rest:
            apart = _Shared(rest, shared.statistics.clone(), shared.inputs)
            self._shared.update(dict.fromkeys(rest, apart))
            shared.members = list(shared.arrived)
        self._complete(shared)

    def settle(self) -> None:
        """The end of a pass: an input that has not come to all by now does not."""
        for shared in {id(shared): shared for shared in self._shared.values()}.values():
            if shared.pending is not None:
                self._divide(shared)
        self._last = None

    def _add(self, shared: _Shared, seen: Seen) -> None:
        if version_of(seen.inputs) != seen.version:
            raise _ChangedInPlace(
                f"the input of {seen.weight.name} was changed in place before all weights that share it had got it"
            )
        for tokens in self._real_tokens(seen):
            if self._check:
                check_finite(tokens, seen, self._batch)
            shared.statistics.add(tokens)
        shared.inputs += 1
        self._last = (seen, shared)

    def _real_tokens(self, seen: Seen) -> Iterable[Tensor]:
        """(tokens, in) inputs without the positions that are padding; a note if these could not be told."""
        if seen.real is None:
            return seen.tokens()
        pieces = list(seen.tokens())
        sizes = [len(piece) for piece in pieces]
        if isinstance(seen.real, str) or sum(sizes) != len(seen.real):
            self.notes.add(
                f"{seen.weight.name}: padding could not be told from tokens in inputs of shape "
                f"{tuple(seen.inputs.shape)}"
            )
            return pieces
        real = seen.real.to(pieces[0].device).split(sizes)
        return [piece[own] for piece, own in zip(pieces, real, strict=True)]

    def all_finite(self) -> bool:
        """Whether all inputs were: looked at once, so that no pass waits for it."""
        return all(bool(shared.statistics.is_finite()) for shared in self._shared.values())

    def parts(self) -> Parts:
        """The statistics of every weight, added up over all ranks of a distributed run."""
        shared = self._agreed() if is_distributed() else {key: own.statistics for key, own in self._shared.items()}
        rows: dict[str, list[Rows]] = {weight.name: [] for weight in self.weights}
        for name, own in shared:
            rows[name].append(own)
        return {weight.name: _parts_of(weight, rows[weight.name], shared, self.kinds) for weight in self.weights}

    def _agreed(self) -> dict[Key, InputStatistics]:
        """What shares on every rank shares; ranks add up."""
        numbers = {id(own): number for number, own in enumerate(self._shared.values())}
        of_ranks = from_all({key: numbers[id(own)] for key, own in self._shared.items()})
        weights = {weight.name: weight for weight in self.weights}
        together: dict[tuple[int | None, ...], InputStatistics] = {}
        found = {}
        for key in sorted(set().union(*of_ranks), key=str):
            signature = tuple(own.get(key) for own in of_ranks)
            if signature not in together:
                weight = weights[key[0]]
                here = self._shared.get(key)
                empty = InputStatistics(weight.shape[1], weight.device, self.kinds)
                together[signature] = here.statistics.clone() if here else empty
                together[signature].reduce_over_ranks()
            found[key] = together[signature]
        return found


def _parts_of(
    weight: PrunableWeight, rows: list[Rows], statistics: Mapping[Key, InputStatistics], kinds: Iterable[str]
) -> list[Part]:
    """The parts of one weight; a single one of no tokens where not all of its rows were seen."""
    size = weight.shape[0]
    ranges = {own or (0, size): statistics[weight.name, own] for own in rows}
    cuts = sorted({0, size}.union(*ranges))
    parts = []
    for start, stop in itertools.pairwise(cuts):
        covering = [found for (first, last), found in ranges.items() if first <= start and stop <= last]
        if not covering:
            return [Part(slice(0, size), InputStatistics(weight.shape[1], weight.device, kinds))]
        parts.append(Part(slice(start, stop), covering[0] if len(covering) == 1 else added_up(covering)))
    return parts
