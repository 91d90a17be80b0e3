"""How much the predictions of a model change when one of its matrices is pruned, from gradients of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import floor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefit.calibration.batches import Forward, MicroBatch, digest
from sparsefit.calibration.samples import split_samples, tensors_in
from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.gram import precise_dtype
from sparsefit.pruning.input_groups import Part
from sparsefit.pruning.layers.base import PrunableWeight, as_matrix, is_dense
from sparsefit.pruning.scores import wanda_score
from sparsefit.pruning.selection import mask_of_smallest
from sparsefit.pruning.statistics import all_finite
from sparsefit.ranks import add_up, errors_on_all_ranks

POINTS = 1000  # of the curve of a matrix


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
    """Measure the sensitivity of each matrix, where each row has lost its share of the smallest Wanda scores.

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

    removed = {}
    for weight in weights:
        count = max(1, floor(weight.shape[1] * config.exact_sparsity))
        removed[weight.name] = ~mask_of_smallest(scores(weight), count)
    changes = prediction_changes(weights, removed, data, forward, step)
    return {w.name: sensitivity(scores(w).square_(), removed[w.name], changes[w.name]) for w in weights}


def sensitivity(squared_scores: Tensor, removed: Tensor, change: Change) -> Sensitivity:
    """The sensitivity of a matrix. The change is taken to grow as the sum of the squared scores that are removed, each
    weighted by what a row's removed scores have changed: half of it that of the row, half the mean of the matrix, as a
    row's own is estimated from few samples.

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
    rows = change.rows.to(lost)
    ratios = torch.where(lost > 0, rows / lost, 0) * (lost.sum() / rows.sum())
    weights = ((ratios + 1) / 2).nan_to_num(1.0, 1.0).float()  # without any change all rows are alike
    ordered = (squared_scores * weights[:, None]).flatten().sort().values
    places = (torch.arange(min(len(ordered), POINTS)) + 0.5) * (len(ordered) / min(len(ordered), POINTS))
    whole = float(lost.sum())
    curve = ordered[places.long().to(ordered.device)].cpu().double() * (change.whole / whole if whole else 0.0)
    return Sensitivity(curve, weights.sqrt())


def prediction_changes(
    weights: Sequence[PrunableWeight],
    removed: Mapping[str, Tensor],
    data: Sequence[MicroBatch],
    forward: Forward,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Change]:
    """The change of a model's predictions when one matrix is pruned, for each matrix and each of its rows alone.

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
        CalibrationError: if logits are not finite.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> layer, data = nn.Linear(2, 3), [MicroBatch(torch.tensor([[3.0, 0.0]]), origin=(0,))]
    >>> first, second = (
    ...     prediction_changes(matrices_of(layer), {"weight": torch.arange(2).expand(3, 2) == column}, data, layer)
    ...     for column in (0, 1)
    ... )
    >>> first["weight"].whole > 0.0, second["weight"].whole  # the second input is 0
    (True, 0.0)
    """
    squares = {w.name: torch.zeros(1 + w.shape[0], dtype=precise_dtype(w.device), device=w.device) for w in weights}

    def square(weight: PrunableWeight, gradient: Tensor) -> None:
        change = as_matrix(gradient, weight.transposed, weight.index).float() * weight.matrix()
        rows = change.mul_(removed[weight.name]).sum(1, dtype=precise_dtype(weight.device))
        squares[weight.name] += torch.cat([rows.sum().view(1), rows]).square_()

    predictions = torch.zeros((), dtype=torch.float64)
    gradients = _gradients_to(weights, square)
    with errors_on_all_ranks(), gradients as parameters, torch.enable_grad(), _without_cached_casts():
        for batch in data:
            for sample, mask in _samples(batch):
                logits = logits_of(forward(sample), mask)
                if not all_finite(logits):
                    raise CalibrationError(
                        "the dense model's logits for a calibration sample are NaN or infinite: look at the model and "
                        "the calibration data"
                    )
                # A sample has the same labels in every order of the data, on every rank and with or without targets.
                seed = int(digest(next(tensors_in(sample), None))[:15], 16)
                generator = torch.Generator(logits.device).manual_seed(seed)
                labels = logits.detach().softmax(1).multinomial(1, generator=generator).squeeze(1)
                F.cross_entropy(logits, labels, reduction="sum").backward(inputs=parameters)
                predictions += len(logits)
            step()
    sums = torch.cat([predictions.view(1), *(total.cpu().double() for total in squares.values())])
    add_up(sums)
    # Rounded, so that the order of additions, which depends on the ranks, does not change what is made of them.
    means = (sums[1:] / (2 * sums[0])).to(torch.bfloat16).double().split([len(total) for total in squares.values()])
    return {name: Change(float(found[0]), found[1:]) for name, found in zip(squares, means, strict=True)}


def logits_of(output: Any, mask: Tensor | None = None) -> Tensor:
    """The logits in the output of a model, (predictions, classes) float32: its `logits`, (batch, classes) or (batch,
    positions, classes), or the output itself, (batch, classes). A tensor of three dimensions may be hidden states or
    embeddings, and is not taken for logits. `mask`, (batch, positions) bool, says which positions count.

    Raises:
        ConfigError: if there are none, or they have no gradient.

    >>> logits_of({"logits": torch.zeros(2, 3, 5, requires_grad=True)}).shape
    torch.Size([6, 5])
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = output if found is None and isinstance(output, Tensor) and output.ndim == 2 else found
    is_logits = isinstance(found, Tensor) and found.ndim in (2, 3) and found.is_floating_point() and found.shape[-1] > 1
    if not is_logits or not found.requires_grad:
        shape = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            "allocation 'fisher' needs the logits of the model's predictions, with a gradient: `logits`, (batch, "
            "classes) or (batch, positions, classes), in the model's output, or a tensor (batch, classes). Calibration "
            f"runs the model and gets {shape}{' without a gradient' if is_logits else ''}: use allocation 'owl', or "
            "run the model so that it returns logits (a LightningModule by a calibration_step(batch))"
        )
    counted = found[mask.to(found.device)] if mask is not None and mask.shape == found.shape[:-1] else found
    return counted.float().flatten(0, -2)


def check_gradients(weights: Iterable[PrunableWeight]) -> None:
    """Raise a `ConfigError` if a weight is quantized.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> check_gradients(matrices_of(nn.Linear(2, 3)))
    """
    for weight in weights:
        if not is_dense(weight.parameter):
            raise ConfigError(
                f"allocation 'fisher' needs gradients, and {weight.name} is quantized: use allocation 'owl'"
            )


def _samples(batch: MicroBatch) -> Iterator[tuple[Any, Tensor | None]]:
    """The samples of a micro-batch, one at a time, each with its mask; all at once if they cannot be separated."""
    samples, real = split_samples(batch.data) or [batch.data], batch.mask.real if batch.mask else None
    for number, sample in enumerate(samples):
        yield sample, real if real is None or len(samples) == 1 else real[number : number + 1]


@contextmanager
def _gradients_to(
    weights: Sequence[PrunableWeight], take: Callable[[PrunableWeight, Tensor], None]
) -> Iterator[list[nn.Parameter]]:
    """Call `take` with each weight and the gradient of its parameter, which is then freed, in each backward pass with
    `inputs` the yielded parameters. Gradients that there were before, and what requires one, are restored at the end.
    """
    users: dict[nn.Parameter, list[PrunableWeight]] = {}
    for weight in weights:
        users.setdefault(weight.parameter, []).append(weight)

    def taken(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        with torch.no_grad():
            for weight in users[parameter]:
                take(weight, gradient)

    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in users]
    hooks = []
    try:
        for parameter in users:
            parameter.grad = None
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(taken))
        yield list(users)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Without autocast's cache, whose copies of weights may have been made without a gradient."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
