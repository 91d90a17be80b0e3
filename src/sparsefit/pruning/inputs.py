"""Collecting the statistics of what weights see while a model, or one of its blocks, runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsefit.calibration.batches import MicroBatch
from sparsefit.calibration.samples import numbers_in
from sparsefit.errors import CalibrationError
from sparsefit.pruning.groups import Part, Parts
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.statistics import InputStatistics, all_finite
from sparsefit.pruning.watch import Key, Rows, Seen, real_rows, version_of, watching
from sparsefit.ranks import errors_on_all_ranks, from_all
from sparsefit.sharded import passes


def collect(
    weights: Sequence[PrunableWeight],
    kinds: Iterable[str],
    data: Sequence[MicroBatch],
    run: Callable[[int], object],
    note: Callable[[str], None],
    shares: Mapping[Key, Fraction | None] | None = None,
    step: Callable[[], None] = lambda: None,
    model: nn.Module | None = None,
    part: nn.Module | None = None,
) -> Parts:
    """The statistics, of `kinds` among `statistics.KINDS`, of what some weights see in the calibration data.

    Args:
        run: Runs the model, or one of its blocks, on the micro-batch of that number.
        shares: As in a `Trace`, if what a pass computes is of no other use: it ends as soon as all weights have got as
            much of the data as they had of the sample that used each of them once.
        step: Called after each pass.
        model: What the weights are of, where that may be sharded.
        part: Which part of it `run` runs, if not all.

    Raises:
        CalibrationError: if an input is not finite; names the layer and the calibration batch.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> layer, data = nn.Linear(2, 3), [MicroBatch(torch.tensor([[3.0, 4.0]]), origin=(0,))]
    >>> parts = collect(matrices_of(layer), (), data, lambda number: layer(data[number].data), note=print)
    >>> parts["weight"][0].statistics["squared_norm"]
    tensor([ 9., 16.])
    """
    names = {weight.name for weight in weights}
    awaited = {key: share for key, share in (shares or {}).items() if key[0] in names}
    if None in awaited.values() or {name for name, _ in awaited} != names:
        awaited = {}

    def collected(kinds: Iterable[str], apart: bool = False) -> _Collector:
        collector = _Collector(weights, kinds, note, apart)

        def one(number: int) -> None:
            collector.begin(data[number], awaited)
            with suppress(_AllSeen):
                run(number)
            collector.settle()
            step()

        with watching(weights, collector.record):
            passes(model, one, len(data), part)
        return collector

    # What a rank must do again all do, as passes through a sharded model are made together.
    changed = None
    with errors_on_all_ranks():
        try:
            collector = collected(kinds)
        except _ChangedInPlace as error:
            changed = str(error)
    if told := [text for text in from_all(changed) if text]:
        note(f"{told[0]}; the statistics were taken again, for each weight by itself")
        with errors_on_all_ranks():
            collector = collected(kinds, apart=True)
    finite = all(shared.statistics.is_finite() for shared in collector.shared.values())  # asked once, as it waits
    if not all(from_all(finite)):
        with errors_on_all_ranks():
            collected(("squared_norm",), apart=True)
            if not finite:
                raise CalibrationError(
                    "the inputs of the model's layers are finite one by one, but their squares add up to more than "
                    "float32 holds. The model was left as it was; look at the calibration data, or scale it down"
                )
    return collector.parts()


class _ChangedInPlace(Exception):
    """An input that is shared is no longer what it was; the message says whose."""


class _AllSeen(BaseException):
    """Every weight has got its input. (No `Exception`: a model may catch these.)"""


@dataclass(eq=False)
class _Shared:
    """What some weights, its members, have all seen so far."""

    members: set[Key]
    statistics: InputStatistics
    inputs: int = 0
    pending: Seen | None = None  # the next input, which has come to some already
    arrived: set[Key] = field(default_factory=set)


class _Collector:
    """Collects statistics while weights are watched, once for each distinct input.

    Weights whose first input is the same tensor share. From then on an input is added once it has come to all of
    them. If it comes to some and not to others they part: what they had seen until then was the same for all.
    With `apart` none shares, and each input is looked at as it comes, to name the one that is not finite.
    """

    def __init__(
        self, weights: Iterable[PrunableWeight], kinds: Iterable[str], note: Callable[[str], None], apart: bool
    ) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self._kinds, self._note, self._apart = kinds, note, apart
        self.shared: dict[Key, _Shared] = {}
        self._last: tuple[Seen, _Shared] | None = None  # the last input that was added

    def begin(self, batch: MicroBatch, awaited: Mapping[Key, Fraction]) -> None:
        """Say which micro-batch runs next, until these shares of it have come; to its end if there are none."""
        self._batch, self._size, self._awaited = batch, numbers_in(batch.data), dict(awaited)
        batch.begin()

    def record(self, seen: Seen) -> None:
        """Take in the input of one weight."""
        mask = self._batch.mask_of(seen.inputs)  # shows now: an input that is shared is added later
        seen = seen._replace(real=None if mask is None else real_rows(mask, seen))
        key = seen.weight_rows
        before, shared = self._last or (None, None)
        if key in self.shared or self._apart or not seen.same_input(before) or shared.inputs > 1:
            self._arrive(key, seen)
        else:  # its first input is the first and only one of those before it
            shared.members.add(key)
            self.shared[key] = shared
        if key in self._awaited and self._awaited[key] * self._size == seen.inputs.numel():
            del self._awaited[key]
            if not self._awaited:
                raise _AllSeen

    def _arrive(self, key: Key, seen: Seen) -> None:
        if key not in self.shared:
            self.shared[key] = _Shared({key}, self._no_statistics(seen.weight))
        shared = self.shared[key]
        if key in shared.arrived or not (shared.pending is None or seen.same_input(shared.pending)):
            self._add_pending(shared)
            shared = self.shared[key]
        shared.pending = seen
        shared.arrived.add(key)
        if shared.arrived == shared.members:
            self._add_pending(shared)

    def _add_pending(self, shared: _Shared) -> None:
        """Add the pending input; those to which it has not come part from those to which it has."""
        rest, seen = shared.members - shared.arrived, shared.pending
        if version_of(seen.inputs) != seen.version:
            raise _ChangedInPlace(
                f"the input of {seen.weight.name} was changed in place before all weights that share it had got it"
            )
        if rest:
            self.shared.update(dict.fromkeys(rest, _Shared(rest, shared.statistics.clone(), shared.inputs)))
        for tokens in self._real_tokens(seen):
            if self._apart:
                _check_finite(tokens, seen, self._batch)
            shared.statistics.add(tokens)
        shared.members, shared.pending, shared.arrived = shared.arrived, None, set()
        shared.inputs += 1
        self._last = (seen, shared)

    def settle(self) -> None:
        """The end of a pass: an input that has not come to all by now does not."""
        for shared in dict.fromkeys(self.shared.values()):
            if shared.pending is not None:
                self._add_pending(shared)
        self._last = None

    def _real_tokens(self, seen: Seen) -> Iterable[Tensor]:
        """(tokens, in) inputs without the positions that are padding; a note if these could not be told."""
        if seen.real is None:
            return seen.tokens()
        pieces = list(seen.tokens())
        sizes = [len(piece) for piece in pieces]
        if isinstance(seen.real, str) or sum(sizes) != len(seen.real):
            self._note(f"{seen.weight.name}: padding could not be told from tokens in its inputs")
            return pieces
        real = seen.real.to(pieces[0].device).split(sizes)
        return [piece[own] for piece, own in zip(pieces, real, strict=True)]

    def parts(self) -> Parts:
        """The statistics of every weight, added up over all ranks of a distributed run."""
        found: dict[str, dict[Rows, InputStatistics]] = {name: {} for name in self._weights}
        for (name, rows), statistics in self._of_all_ranks().items():
            found[name][rows] = statistics
        return {name: self._parts_of(weight, found[name]) for name, weight in self._weights.items()}

    def _of_all_ranks(self) -> dict[Key, InputStatistics]:
        """What shares on every rank shares; ranks add up."""
        found = {key: shared.statistics for key, shared in self.shared.items()}
        numbers = {statistics: number for number, statistics in enumerate(found.values())}
        of_ranks = from_all({key: numbers[statistics] for key, statistics in found.items()})
        if len(of_ranks) == 1:
            return found
        together: dict[tuple[int | None, ...], InputStatistics] = {}
        for key in sorted(set().union(*of_ranks), key=str):
            signature = tuple(own.get(key) for own in of_ranks)
            if signature not in together:
                here = found[key].clone() if key in found else self._no_statistics(self._weights[key[0]])
                here.reduce_over_ranks()
                together[signature] = here
            found[key] = together[signature]
        return found

    def _parts_of(self, weight: PrunableWeight, found: Mapping[Rows, InputStatistics]) -> list[Part]:
        """The parts of one weight; a single one of no tokens where not all of its rows were seen."""
        whole = (0, weight.shape[0])
        ranges = {rows or whole: statistics for rows, statistics in found.items()}
        parts = []
        for start, stop in pairwise(sorted(set(whole).union(*ranges))):
            covering = [own for (first, last), own in ranges.items() if first <= start and stop <= last]
            if not covering:
                return [Part(slice(*whole), self._no_statistics(weight))]
            total = covering[0] if len(covering) == 1 else covering[0].clone()
            for other in covering[1:]:
                total.merge(other)
            parts.append(Part(slice(start, stop), total))
        return parts

    def _no_statistics(self, weight: PrunableWeight) -> InputStatistics:
        return InputStatistics(weight.shape[1], weight.device, self._kinds)


def _check_finite(tokens: Tensor, seen: Seen, batch: MicroBatch) -> None:
    """Raise a CalibrationError that names the layer and the batch if some of its (tokens, in) inputs are not finite."""
    if all_finite(tokens.float().square()):
        return
    origin = batch.origin
    # The tokens of packed sequences come step by step, and those of an expert in an order of their own.
    packed = seen.inputs.ndim == 2 and isinstance(seen.weight.layers[0], nn.RNNBase)
    if seen.weight.index is None and not packed:
        finite = torch.cat([tokens.float().square().isfinite().all(dim=1) for tokens in seen.tokens()])
        if len(finite) % len(origin) == 0:
            samples = finite.view(len(origin), -1).all(dim=1).tolist()
            origin = [number for number, fine in zip(origin, samples, strict=True) if not fine][:1] or origin
    raise CalibrationError(
        f"the inputs of {seen.weight.name} are NaN or infinite in calibration batch "
        f"{' or '.join(map(str, dict.fromkeys(origin)))}. The model was left as it was; look at that batch, or run the "
        "model in float32 or bfloat16 if it overflows in float16"
    )
