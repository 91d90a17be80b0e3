"""What the rows of a pruning study say, in sentences: all of them count and average, none claims more than that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsefit.reporting.study_table import MINUS, PRUNED, Point, Results, Way, is_log, per, read_results, unique

_Place = tuple[str, str]  # (model, amount): where two ways of pruning are compared
_POINTS_FREE, _RISE_FREE = 0.01, 0.10  # what a sparsity may cost to be called cheap: accuracy, perplexity


class Duel(NamedTuple):
    """Two contenders, compared wherever both were measured; differences are positive where the first is better."""

    first: str
    second: str
    gains: dict[_Place, float]

    @property
    def wins(self) -> int:
        """Where the first is better."""
        return sum(gain > 0 for gain in self.gains.values())

    @property
    def losses(self) -> int:
        """Where the second is better."""
        return sum(gain < 0 for gain in self.gains.values())

    def turned(self) -> Duel:
        """The same, seen from the other side."""
        return Duel(self.second, self.first, {place: -gain for place, gain in self.gains.items()})


def findings(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Topics and the sentences of each, for the first metric of each model; topics without a sentence are left out."""
    asked = read_results(study, rows)
    results = _as_used(asked)
    groups: dict[str, list[str]] = {}
    for model in results.models:
        groups.setdefault(results.metric_of(model), []).append(model)
    topics: dict[str, list[str]] = {
        topic: []
        for topic in ("Scores", "Granularities", "Order", "Sparsity at little cost", "N:M patterns", "Fine-tuning")
    }
    for metric, models in groups.items():
        points = [p for p in results.points if p.model in models and metric in p.values]
        for stage in results.stages():
            of_stage = [point for point in points if point.stage == stage]
            opening = "" if stage == PRUNED else f"{stage}, "
            for topic, told in _comparisons(results, metric, of_stage):
                topics[topic] += [_sentence(opening + text) for text in told]
        topics["N:M patterns"] += map(_sentence, _patterns(results, metric, points))
        for model in models:
            own = [point for point in points if point.model == model]
            for topic, told in (
                ("Sparsity at little cost", _cheap(results, model, metric, own)),
                ("Fine-tuning", _recovery(results, model, metric, own)),
            ):
                topics[topic] += [f"{model}: {text}" if len(results.models) > 1 else _sentence(text) for text in told]
    topics["Counted"] = _counted(asked)
    return [(topic, told) for topic, told in topics.items() if told]


def _as_used(results: Results) -> Results:
    """The results with each point under the order that it was really pruned in, which is the one that it speaks of.

    A point that fell back to an order is left out where that order was measured itself: it would say the same twice.
    """

    def key(point: Point) -> tuple[Any, ...]:
        return point.model, point.stage, point.way, point.pattern, point.sparsity

    measured, points = {key(point) for point in results.points if not point.used and not point.error}, []
    for point in results.points:
        if point.used:
            point = point._replace(way=point.way._replace(update=point.used))
            if key(point) in measured:
                continue
            measured.add(key(point))
        points.append(point)
    return results._replace(points=points)


def headline(results: Results, model: str, score: str) -> Way | None:
    """The way that stands for a score where scores are compared on a model.

    Image classifiers are compared per layer where that was tried, as in the paper; else, and for perplexities, it is
    the first granularity of the score. None where the score was used with N:M patterns alone.
    """
    ways = [p.way for p in results.points if p.model == model and p.way.score == score and not p.pattern]
    layer = [way for way in ways if way.granularity == "layer" and not is_log(results.metric_of(model))]
    return next(iter(layer or ways), None)


def gain(metric: str, better: str, first: float, second: float) -> float:
    """By how much the first value is better than the second, in points of a share, or in log space for perplexities."""
    if first == second:
        return 0.0
    if is_log(metric) and min(first, second) > 0:
        first, second = math.log(first), math.log(second)
    return first - second if better == "higher" else second - first


def _comparisons(results: Results, metric: str, points: Sequence[Point]) -> Iterable[tuple[str, list[str]]]:
    """Scores against each other, and for each score its granularities and its orders."""
    better = results.metrics.get(metric, "higher")
    standing = [p for p in points if p.way == headline(results, p.model, p.way.score)]
    if len({p.way.granularity for p in standing}) == 1:
        yield "Scores", _duels(metric, better, standing, lambda p: p.way.score, results.detail(standing[0].way))
    else:
        yield "Scores", _duels(metric, better, standing, lambda p: results.name(p.way))
    for score in unique(p.way.score for p in points):
        own = [p for p in points if p.way.score == score and not p.pattern]
        for update in unique(p.way.update for p in own):
            order = f", update {update or 'none'}" if len(results.updates(score)) > 1 else ""
            alike = [p for p in own if p.way.update == update]
            how = f"with {score}{order}"
            yield "Granularities", _duels(metric, better, alike, lambda p: per(p.way.granularity), how)
        for granularity in unique(p.way.granularity for p in own):
            alike = [p for p in own if p.way.granularity == granularity and not p.used]
            how = f"with {score} {per(granularity)}".rstrip()
            yield "Order", _duels(metric, better, alike, lambda p: f"update {p.way.update or 'none'}", how)
    for pattern in unique(p.pattern for p in points if p.pattern):
        alike = [p for p in points if p.pattern == pattern]
        yield "N:M patterns", _duels(metric, better, alike, _contender(results, alike), f"with {pattern}")


def _contender(results: Results, points: Sequence[Point]) -> Callable[[Point], str]:
    """How points are told apart: by the score alone where that is enough."""
    enough = len({point.way for point in points}) == len({point.way.score for point in points})
    return lambda point: point.way.score if enough else results.name(point.way)


def _duels(metric: str, better: str, points: Sequence[Point], name: Callable[[Point], str], how: str = "") -> list[str]:
    """A sentence for the leader among the contenders against each of the others."""
    values: dict[str, dict[_Place, float]] = {}
    for point in points:
        values.setdefault(name(point), {})[point.model, point.amount] = point.values[metric]

    def duel(first: str, second: str) -> Duel:
        places = [place for place in values[first] if place in values[second]]
        gains = {place: gain(metric, better, values[first][place], values[second][place]) for place in places}
        return Duel(first, second, gains)

    def strength(first: str) -> tuple[int, float]:
        duels = [duel(first, second) for second in values if second != first]
        return sum(d.wins - d.losses for d in duels), sum(_mean(d.gains.values()) or 0.0 for d in duels)

    leader = max(values, key=strength, default="")
    duels = [found for other in values if other != leader and (found := duel(leader, other)).gains]
    return [_told(metric, d.turned() if d.losses > d.wins else d, how) for d in duels]


def _told(metric: str, duel: Duel, how: str) -> str:
    models, count = unique(model for model, _ in duel.gains), len(duel.gains)
    ties = count - duel.wins - duel.losses
    if count == 1:
        amount = next(iter(duel.gains))[1]
        where = "" if amount in how else f" at {amount}"
    else:
        places = "sparsities" if len(models) == 1 else f"settings of {len(models)} models"
        where = f" at {duel.wins} of {count} {places}" if ties < count else f" at all {count} {places}"
        where += f", {ties} tied," if 0 < ties < count else ""
    where += f" {how}" if how else ""
    mean = _mean(duel.gains.values())
    facts = [f"{'mean ' if count > 1 else ''}{difference(metric, mean)}"] if mean is not None and ties < count else []
    if len(models) > 1 and 0 < duel.wins < count:
        won = {m: [gained > 0 for (model, _), gained in duel.gains.items() if model == m] for m in models}
        facts.append(", ".join(f"{model} {sum(wins)} of {len(wins)}" for model, wins in won.items()))
    shown = f" ({'; '.join(facts)})" if facts else ""
    if ties == count:
        return f"{duel.first} and {duel.second} give the same{where}"
    if duel.wins == duel.losses:
        return f"{duel.first} and {duel.second} each win{where}{shown}"
    return f"{duel.first} beats {duel.second}{where}{shown}"


def _mean(values: Iterable[float]) -> float | None:
    """The mean of the finite ones: a perplexity that exploded counts as lost, but has no size."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def difference(metric: str, gained: float) -> str:
    """A gain for people: points of an accuracy, per cent of a perplexity, else the metric's own unit."""
    if "accuracy" in metric:
        text = f"{100 * gained:+.2f} points"
    elif is_log(metric):
        text = f"{math.expm1(-gained):+.1%} {metric}"
    else:
        text = f"{gained:+.3g} {metric}"
    return text.replace("-", MINUS)


def _cheap(results: Results, model: str, metric: str, points: Sequence[Point]) -> list[str]:
    """The highest sparsity that costs little, at each stage."""
    dense, better = results.dense.get(model, {}).get(metric), results.metrics.get(metric, "higher")
    if dense is None or not ("accuracy" in metric or is_log(metric)):
        return []
    limit, free = ("1 point", _POINTS_FREE) if "accuracy" in metric else ("10%", math.log1p(_RISE_FREE))
    told = []
    for stage in results.stages():
        own = [p for p in points if p.stage == stage and not p.pattern]
        costs = [(gain(metric, better, dense, p.values[metric]), p) for p in own]
        cheap = [(cost, p) for cost, p in costs if cost <= free + 1e-12]
        if not costs:
            continue
        cost, best = max(cheap or costs, key=lambda pair: (pair[1].sparsity if cheap else 0.0, -pair[0]))
        size = difference(metric, -cost) if math.isfinite(cost) else f"infinite {metric}"
        how = f"{results.name(best.way)}: {size}"
        text = f"{best.amount} ({how})" if cheap else f"none of those tried, nearest {best.amount} ({how})"
        told.append(text if stage == PRUNED else f"{stage}, {text}")
    return [f"within {limit} of the dense {metric.replace('_', ' ')}: {'; '.join(told)}"] if told else []


def _patterns(results: Results, metric: str, points: Sequence[Point]) -> list[str]:
    """What a pattern costs more than the same sparsity without one, right after pruning."""
    better = results.metrics.get(metric, "higher")
    found: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    free = {(p.model, p.way, p.sparsity, p.stage): p for p in points if not p.pattern}
    for point in points:
        way = headline(results, point.model, point.way.score)
        if way is None or not point.pattern or point.stage != PRUNED:
            continue
        other = free.get((point.model, way._replace(update=point.way.update), point.sparsity, point.stage))
        lost = gain(metric, better, other.values[metric], point.values[metric]) if other else math.nan
        if other and math.isfinite(lost):
            key = (point.pattern, other.amount, results.name(other.way))
            found.setdefault(key, []).append((point.model, lost))
    told: dict[tuple[str, str], list[str]] = {}
    for (pattern, amount, name), losses in found.items():
        models = unique(model for model, _ in losses)
        over = f" (mean of {len(models)} models)" if len(models) > 1 else ""
        mean = sum(lost for _, lost in losses) / len(losses)
        told.setdefault((pattern, amount), []).append(f"{name} {difference(metric, -mean)}{over}")
    return [
        f"{pattern} against {amount} without a pattern: {'; '.join(names)}" for (pattern, amount), names in told.items()
    ]


def _recovery(results: Results, model: str, metric: str, points: Sequence[Point]) -> list[str]:
    """What fine-tuning leaves of what pruning lost, at the highest sparsity that has both."""
    dense, better = results.dense.get(model, {}).get(metric), results.metrics.get(metric, "higher")
    before = {(p.way, p.amount): p for p in points if p.stage == PRUNED}
    told = []
    for stage in results.stages():
        after = [p for p in points if p.stage == stage != PRUNED and (p.way, p.amount) in before]
        if dense is None or not after:
            continue
        best = max(after, key=lambda p: (p.sparsity, gain(metric, better, p.values[metric], dense)))
        lost = gain(metric, better, before[best.way, best.amount].values[metric], dense)
        left = gain(metric, better, best.values[metric], dense)
        if math.isfinite(lost) and math.isfinite(left):
            share = f", {left / lost:.0%} of the loss is left" if left < 0 and lost < 0 else ""
            told.append(
                f"at {best.amount} ({results.name(best.way)}), {difference(metric, lost)} from the dense model right "
                f"after pruning, {difference(metric, left)} {stage}{share}"
            )
    return told


def _counted(results: Results) -> list[str]:
    """How far the zeros that were counted are from the sparsity that was asked for."""
    gaps = [(abs(p.counted - p.sparsity), p) for p in results.points if p.counted is not None and not p.error]
    if not gaps:
        return []
    widest, point = max(gaps, key=lambda pair: pair[0])
    models = f"{len(gaps)} measured model{'s' if len(gaps) > 1 else ''}"
    if widest < 5e-6:
        return [f"The zeros counted in {models} are what was asked for"]
    where = f" ({point.model}, {results.name(point.way)}, {point.amount}, {point.stage})" if widest > 5e-4 else ""
    return [f"The zeros counted in {models} are within {100 * widest:.2g} points of the sparsity asked for{where}"]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
