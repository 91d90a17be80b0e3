"""How much the predictions of a model change when one of its matrices is pruned, from gradients of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil, floor, isfinite
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefit.calibration.batches import Forward, MicroBatch
from sparsefit.calibration.samples import split_samples
from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.gram import precise_dtype
from sparsefit.pruning.input_groups import Part
from sparsefit.pruning.layers.base import PrunableWeight, as_matrix, is_dense
from sparsefit.pruning.predictions import labels_seed, logits_of
from sparsefit.pruning.scores import wanda_score
from sparsefit.pruning.selection import mask_of_smallest
from sparsefit.pruning.statistics import all_finite
from sparsefit.ranks import errors_on_all_ranks, from_all

POINTS = 1000  # of the curve of a matrix
NOT_FINITE = "{} for a calibration sample are NaN or infinite: look at the model and the calibration data"


class Change(NamedTuple):
    """The change of the predictions when a matrix is pruned, in nats per prediction."""

    whole: float  # by all removed weights together
    rows: Tensor  # (out,) float64: by those of each row alone


class Sensitivity(NamedTuple):
    """What the weights of a matrix mean for the predictions."""

    curve: Tensor  # (points,) float64, ascending: the change by each further weight, as more and more are removed
    scales: Tensor  # (out,) float32: what makes the scores of different rows comparable


def sensitivities(
    weights: Sequence[PrunableWeight],
    parts: Mapping[str, list[Part]],
    config: PruningConfig,
    data: Sequence[MicroBatch],
    forward: Forward,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Sensitivity]:
    """Measure the sensitivity of each matrix, where each row has lost its share of the smallest Wanda scores; weights
    that are zero already do not count. Matrices of which nothing can be measured are left out: no gradient of the
    predictions reaches them, or no input.

    Args:
        weights: The weights.
        parts: Their input statistics in the dense network.
        config: With the sparsity.
        data: The calibration data.
        forward: Runs the model on a batch.
        step: Called after each micro-batch.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> from sparsefit.pruning.statistics import InputStatistics
    >>> layer, inputs = nn.Linear(2, 3), torch.tensor([[3.0, 4.0]])
    >>> (statistics := InputStatistics(2, inputs.device)).add(inputs)
    >>> parts, data = {"weight": [Part(slice(0, 3), statistics)]}, [MicroBatch(inputs, origin=(0,))]
    >>> sensitivities(matrices_of(layer), parts, PruningConfig(), data, layer)["weight"].scales.shape
    torch.Size([3])
    """

    def scores(weight: PrunableWeight) -> Tensor:
        matrix = weight.matrix()
        return torch.cat([wanda_score(matrix[rows], own["squared_norm"]).scores() for rows, own in parts[weight.name]])

    seen = [weight for weight in weights if parts[weight.name]]
    removed = {}
    for weight in seen:
        zeros = weight.matrix() == 0
        filled = ceil((zeros.numel() - int(zeros.sum())) / len(zeros))  # of a row
        count = max(1, floor(filled * config.exact_sparsity))
        removed[weight.name] = ~mask_of_smallest(scores(weight).masked_fill_(zeros, torch.inf), count)
    changes = prediction_changes(seen, removed, data, forward, step)
    found = {
        w.name: sensitivity(scores(w).square_(), removed[w.name], changes[w.name]) for w in seen if w.name in changes
    }
    return {name: own for name, own in found.items() if own is not None}


def sensitivity(squared_scores: Tensor, removed: Tensor, change: Change) -> Sensitivity | None:
    """The sensitivity of a matrix; None if the removed weights do not change its outputs. The change of the
    predictions is taken to grow as the sum of the squared scores that are removed, each weighted by what a row's
    removed scores have changed: half of it that of the row, half the mean of the matrix, as a row's own is estimated
    from few samples.

    Args:
        squared_scores: (out, in): the squared change of an output by the removal of one weight (Wanda's score squared).
        removed: (out, in) bool: what was removed where `change` was measured.
        change: What `prediction_changes` gave.

    >>> change = Change(10.0, torch.tensor([3.0, 1.0]))
    >>> curve, scales = sensitivity(torch.tensor([[4.0, 1.0], [9.0, 1.0]]), torch.eye(2).bool().flip(1), change)
    >>> scales.square(), curve
    (tensor([4.2500, 0.6389]), tensor([ 0.6389,  4.2500,  5.7500, 17.0000], dtype=torch.float64))
    """
    precise = precise_dtype(squared_scores.device)
    lost = (squared_scores * removed).sum(1, dtype=precise)
    whole = float(lost.sum())
    if not whole:
        return None
    rows = change.rows.to(lost)
    ratios = torch.where(lost > 0, rows / lost, 0) * (lost.sum() / rows.sum())
    weights = ((ratios + 1) / 2).nan_to_num(1.0, 1.0).float()  # without any change all rows are alike
    ordered = (squared_scores * weights[:, None]).flatten().sort().values
    points = min(len(ordered), POINTS)
    places = (2 * torch.arange(points, device=ordered.device) + 1) * len(ordered) // (2 * points)
    curve = ordered[places].cpu().double() * (change.whole / whole)
    return Sensitivity(curve, weights.sqrt())


def prediction_changes(
    weights: Sequence[PrunableWeight],
    removed: Mapping[str, Tensor],
    data: Sequence[MicroBatch],
    forward: Forward,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Change]:
    """The change of a model's predictions when one matrix is pruned, for each matrix that a gradient of the predictions
    reaches, and for each of its rows alone.

    It is the Kullback-Leibler divergence from the dense model's predictions to second order, in nats per prediction:
    half the mean of (g . w)^2, where w are the removed weights and g is the gradient of the log-probability of labels
    drawn from the model's own predictions, so that the mean of g g^T is the Fisher information (Kunstner et al. 2019,
    arXiv 1905.12558). One draw of labels and one backward pass for each sample; weights and gradients do not change.

    Args:
        weights: The weights, plain floats and not sharded over ranks.
        removed: For each weight by name which of its elements pruning removes, (out, in) bool.
        data: The calibration data; each rank has its share.
        forward: Runs the model on a batch and returns its logits (see `logits_of`).
        step: Called after each micro-batch.

    Raises:
        ConfigError: if the model returns no logits, or no gradient reaches them.
        CalibrationError: if logits or gradients are not finite.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> layer, data = nn.Linear(2, 3), [MicroBatch(torch.tensor([[3.0, 0.0]]), origin=(0,))]
    >>> first, second = (
    ...     prediction_changes(matrices_of(layer), {"weight": torch.arange(2).expand(3, 2) == column}, data, layer)
    ...     for column in (0, 1)
    ... )
    >>> first["weight"].whole > 0.0, second["weight"].whole  # the second input is 0
    (True, 0.0)
    """
    # Of each matrix: how many gradients came, the squared change by the whole matrix, and those by its rows.
    squares = {w.name: torch.zeros(2 + w.shape[0], dtype=precise_dtype(w.device), device=w.device) for w in weights}

    def square(weight: PrunableWeight, gradient: Tensor) -> None:
        change = as_matrix(gradient, weight.transposed, weight.index).float() * weight.matrix()
        rows = change.mul_(removed[weight.name]).sum(1, dtype=precise_dtype(weight.device))
        squares[weight.name] += torch.cat([rows.new_ones(1), rows.sum().view(1), rows]).square_()

    predictions = torch.zeros((), dtype=torch.float64)
    gradients = _gradients_to(weights, square)
    with errors_on_all_ranks(), gradients as parameters, torch.enable_grad():
        for batch in data:
            for sample, mask in _samples(batch):
                logits = logits_of(forward(sample), mask, sample)
                if not all_finite(logits):
                    raise CalibrationError(NOT_FINITE.format("the dense model's logits"))
                generator = torch.Generator(logits.device).manual_seed(labels_seed(sample))
                labels = logits.detach().softmax(1).multinomial(1, generator=generator).squeeze(1)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                torch.autograd.grad(loss, parameters, allow_unused=True)
                predictions += len(logits)
            step()
    sums = torch.cat([predictions.view(1), *(total.cpu().double() for total in squares.values())])
    sums = torch.stack(from_all(sums)).sum(0)
    # Rounded, so that the order of additions, which depends on the ranks, does not change what is made of them.
    means = (sums[1:] / (2 * sums[0])).to(torch.bfloat16).double().split([len(total) for total in squares.values()])
    changes = {n: Change(float(mean[1]), mean[2:]) for n, mean in zip(squares, means, strict=True) if mean[0] != 0}
    if weights and not changes:
        raise ConfigError(
            "allocation 'fisher' needs gradients, and those of the logits reach no weight that is pruned; the model "
            "may run them under torch.no_grad(): use allocation 'owl'"
        )
    for name, change in changes.items():
        if not (isfinite(change.whole) and all_finite(change.rows)):
            raise CalibrationError(NOT_FINITE.format(f"the gradients of {name}"))
    return changes


def check_gradients(model: nn.Module, weights: Iterable[PrunableWeight]) -> None:
    """Raise a `ConfigError` if a weight is quantized, or the model does not predict one of several classes.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> check_gradients(layer := nn.Linear(2, 3), matrices_of(layer))
    """
    for module in model.modules():
        problem = getattr(getattr(module, "config", None), "problem_type", None)
        if problem in ("regression", "multi_label_classification"):
            raise ConfigError(
                "allocation 'fisher' draws one of several classes from the model's predictions, and the problem_type "
                f"of {type(module).__name__} is {problem}: use allocation 'owl'"
            )
    for weight in weights:
        if not is_dense(weight.parameter):
            raise ConfigError(
                f"allocation 'fisher' needs gradients, and {weight.name} is quantized: use allocation 'owl'"
            )


@contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Have parameters require gradients, as in the measurement; what they required is restored at the end.

    >>> layer = nn.Linear(2, 3).requires_grad_(False)
    >>> with requiring_gradients([layer.weight]): print(layer(torch.ones(1, 2)).requires_grad)
    True
    """
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _samples(batch: MicroBatch) -> Iterator[tuple[Any, Tensor | None]]:
    """The samples of a micro-batch, one at a time, each with its mask; all at once if they cannot be separated."""
    samples, real = split_samples(batch.data) or [batch.data], batch.mask.real if batch.mask else None
    for number, sample in enumerate(samples):
        yield sample, real if real is None or len(samples) == 1 else real[number : number + 1]


@contextmanager
def _gradients_to(
    weights: Sequence[PrunableWeight], take: Callable[[PrunableWeight, Tensor], None]
) -> Iterator[list[nn.Parameter]]:
    """Call `take` with each weight and the gradient of its parameter, which is then freed, whenever
    `torch.autograd.grad` reaches one of the yielded parameters. No gradient is accumulated, so neither `.grad` changes
    nor does a hook run that waits for it (of DDP, or an optimizer step in the backward pass).
    """
    users: dict[nn.Parameter, list[PrunableWeight]] = {}
    for weight in weights:
        users.setdefault(weight.parameter, []).append(weight)

    def taken(own: list[PrunableWeight], gradient: Tensor) -> Tensor:
        with torch.no_grad():
            for weight in own:
                take(weight, gradient)
        return gradient.new_zeros(()).expand_as(gradient)  # takes no memory in the place of the gradient

    with requiring_gradients(users), ExitStack() as hooks:
        for parameter, own in users.items():
            hooks.enter_context(parameter.register_hook(partial(taken, own)))
        yield list(users)
