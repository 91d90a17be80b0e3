"""Collecting statistics of the inputs of weights while a model, or one of its blocks, runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsefit.calibration.batches import MicroBatch
from sparsefit.calibration.samples import numbers_in
from sparsefit.errors import CalibrationError
from sparsefit.pruning.input_groups import Part, Parts
from sparsefit.pruning.input_watch import Key, Rows, Seen, real_rows, version_of, watching
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.statistics import InputStatistics, all_finite
from sparsefit.ranks import errors_on_all_ranks, from_all, own_rank
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
    """Collect statistics of the inputs of some weights over the calibration data.

    Args:
        kinds: Which statistics: names from `statistics.KINDS`.
        run: Runs the model, or one of its blocks, on the micro-batch of that number.
        note: Called with a sentence for the user if something could not be done as asked.
        shares: `Trace.shares`, if the output of a pass is not needed: a pass then stops as soon as each weight has had
            the same share of the batch as it had of the traced sample.
        step: Called after each pass.
        model: The model of the weights, if it may be sharded.
        part: The part of the model that `run` runs, if not all of it.

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

    # If one rank must repeat its passes, all repeat them: passes through a sharded model need all ranks.
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
    # Once for all inputs, as it waits for the GPU.
    finite = all(all_finite(shared.statistics["squared_norm"]) for shared in collector.shared.values())
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
    """A shared input was changed in place before it was added; the message names the weight."""


class _AllSeen(BaseException):
    """Stops a pass: every weight has received its input. (Not an `Exception`, which a model might catch.)"""


@dataclass(eq=False)
class _Shared:
    """The statistics of several weights, the members, that have had the same inputs so far."""

    members: set[Key]
    statistics: InputStatistics
    inputs: int = 0
    pending: Seen | None = None  # the next input, which some members have received already
    arrived: set[Key] = field(default_factory=set)  # those members


class _Collector:
    """Collects statistics while weights are watched, once for each distinct input.

    Weights whose first input is the same tensor share one statistic. From then on an input is added once all of them
    have received it. If only some receive it, the rest split off with a copy of what all have seen until then.
    With `apart` no statistic is shared, and each input is checked as it comes, to name the one that is not finite.
    """

    def __init__(
        self, weights: Iterable[PrunableWeight], kinds: Iterable[str], note: Callable[[str], None], apart: bool
    ) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self._kinds, self._note, self._apart = kinds, note, apart
        self.shared: dict[Key, _Shared] = {}
        self._last: tuple[Seen, _Shared] | None = None  # the most recently added input

    def begin(self, batch: MicroBatch, awaited: Mapping[Key, Fraction]) -> None:
        """Announce the micro-batch that runs next. The pass stops once the `awaited` shares of it have been seen; if
        that is empty, it runs to its end."""
        self._batch, self._size, self._awaited = batch, numbers_in(batch.data), dict(awaited)
        batch.begin()

    def record(self, seen: Seen) -> None:
        """Take in the input of one weight."""
        mask = self._batch.mask_of(seen.inputs)  # now, as a shared input is only added later
        seen = seen._replace(real=None if mask is None else real_rows(mask, seen))
        key = seen.weight_rows
        before, shared = self._last or (None, None)
        if key in self.shared or self._apart or not seen.same_input(before) or shared.inputs > 1:
            self._arrive(key, seen)
        else:  # its first input is the first and only input of the members so far
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
        """Add the pending input to the members that received it; split off the others."""
        rest, seen = shared.members - shared.arrived, shared.pending
        if version_of(seen.inputs) != seen.version:
            raise _ChangedInPlace(
                f"the input of {seen.weight.name} was changed in place before all weights that share it had got it"
            )
        if rest:
            self.shared.update(dict.fromkeys(rest, _Shared(rest, deepcopy(shared.statistics), shared.inputs)))
        for tokens in self._real_tokens(seen):
            if self._apart:
                _check_finite(tokens, seen, self._batch)
            shared.statistics.add(tokens)
        shared.members, shared.pending, shared.arrived = shared.arrived, None, set()
        shared.inputs += 1
        self._last = (seen, shared)

    def settle(self) -> None:
        """End a pass: members that have not received the pending input by now will not, and are split off."""
        for shared in dict.fromkeys(self.shared.values()):
            if shared.pending is not None:
                self._add_pending(shared)
        self._last = None

    def _real_tokens(self, seen: Seen) -> Iterable[Tensor]:
        """The (tokens, in) inputs without padding; all of them, with a note, if padding could not be told."""
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
        """The statistics of every weight, summed in place over all ranks of a distributed run: to be called once."""
        found: dict[str, dict[Rows, InputStatistics]] = {name: {} for name in self._weights}
        for (name, rows), statistics in self._of_all_ranks().items():
            found[name][rows] = statistics
        return {name: self._parts_of(weight, found[name]) for name, weight in self._weights.items()}

    def _of_all_ranks(self) -> dict[Key, InputStatistics]:
        """Statistics summed over ranks. Weights share one if they share one on every rank."""
        found = {key: shared.statistics for key, shared in self.shared.items()}
        numbers = {statistics: number for number, statistics in enumerate(found.values())}
        of_ranks = from_all({key: numbers[statistics] for key, statistics in found.items()})
        if len(of_ranks) == 1:
            return found
        signatures = {key: tuple(own.get(key) for own in of_ranks) for key in sorted(set().union(*of_ranks), key=str)}
        users = Counter(signature[own_rank()] for signature in set(signatures.values()))
        together: dict[tuple[int | None, ...], InputStatistics] = {}
        for key, signature in signatures.items():
            if signature not in together:
                here = found[key] if key in found else self._no_statistics(self._weights[key[0]])
                if users[signature[own_rank()]] > 1:  # this rank's own sum is needed again
                    here = deepcopy(here)
                here.reduce_over_ranks()
                together[signature] = here
            found[key] = together[signature]
        return found

    def _parts_of(self, weight: PrunableWeight, found: Mapping[Rows, InputStatistics]) -> list[Part]:
        """The parts of one weight; a single one with no tokens if not all of its rows were seen."""
        whole = (0, weight.shape[0])
        ranges = {rows or whole: statistics for rows, statistics in found.items()}
        parts = []
        for start, stop in pairwise(sorted(set(whole).union(*ranges))):
            covering = [own for (first, last), own in ranges.items() if first <= start and stop <= last]
            if not covering:
                return [Part(slice(*whole), self._no_statistics(weight))]
            total = covering[0] if len(covering) == 1 else deepcopy(covering[0])
            for other in covering[1:]:
                total.merge(other)
            parts.append(Part(slice(start, stop), total))
        return parts

    def _no_statistics(self, weight: PrunableWeight) -> InputStatistics:
        return InputStatistics(weight.shape[1], weight.device, self._kinds)


def _check_finite(tokens: Tensor, seen: Seen, batch: MicroBatch) -> None:
    """Raise a CalibrationError that names the layer and the batch if some (tokens, in) inputs are not finite."""
    if all_finite(tokens.float().square()):
        return
    origin = batch.origin
    # Tokens of packed sequences come step by step, and those of experts as they were routed: no sample can be named.
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
