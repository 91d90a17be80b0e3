"""Collects the inputs of convolutions, recurrent and linear layers with plain hooks and loops, and checks masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference import assert_mask, reference_scores, squared_norm_of
from reference_inputs import run_model
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Groups = list[list[Tensor]]
"""For each group of rows of a weight (all of the same size), the (tokens, in) inputs of each call."""

# Sums of squares that are added up in another order differ by so much at most: weights whose scores are nearer to each
# other than that may go either way, all others may not.
ROUNDING = 2e-6


def unfolded(layer: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The inputs of each group of a convolution's outputs: (outputs, channels * positions)."""
    dims = len(layer.kernel_size)
    batch = inputs if inputs.ndim == dims + 2 else inputs[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(batch, layer._reversed_padding_repeated_twice, mode)
    found = []
    for own in padded.chunk(layer.groups, dim=1):
        if dims == 3:
            found.append(_unfolded_in_space(layer, own))
            continue
        image = own if dims == 2 else own[:, :, None]
        settings = [(1,) * (2 - dims) + sizes for sizes in (layer.kernel_size, layer.dilation, layer.stride)]
        kernel, dilation, stride = settings
        patches = F.unfold(image, kernel, dilation=dilation, stride=stride)
        found.append(patches.transpose(1, 2).flatten(0, 1))
    return found


def _unfolded_in_space(layer: nn.Conv3d, padded: Tensor) -> Tensor:
    places = [
        range(0, size - step * (kernel - 1), stride)
        for size, kernel, step, stride in zip(
            padded.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True
        )
    ]
    spans = [step * (kernel - 1) + 1 for kernel, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    rows = []
    for sample in padded:
        for x in places[0]:
            for y in places[1]:
                for z in places[2]:
                    around = [
                        slice(start, start + span, step)
                        for start, span, step in zip((x, y, z), spans, layer.dilation, strict=True)
                    ]
                    rows.append(sample[(slice(None), *around)].flatten())
    return torch.stack(rows)


def step(layer: nn.Module, x: Tensor, h: Tensor, c: Tensor, suffix: str) -> tuple[Tensor, Tensor]:
    """The states after one step of one sequence."""
    given = getattr(layer, f"weight_ih{suffix}") @ x
    before = getattr(layer, f"weight_hh{suffix}") @ h
    if layer.bias:
        given, before = given + getattr(layer, f"bias_ih{suffix}"), before + getattr(layer, f"bias_hh{suffix}")
    if isinstance(layer, nn.LSTM | nn.LSTMCell):
        i, f, g, o = (given + before).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (getattr(layer, f"weight_hr{suffix}") @ h if getattr(layer, "proj_size", 0) else h), c
    if isinstance(layer, nn.GRU | nn.GRUCell):
        (r, z, n), (r_h, z_h, n_h) = given.chunk(3), before.chunk(3)
        n, z = (n + (r + r_h).sigmoid() * n_h).tanh(), (z + z_h).sigmoid()
        return (1 - z) * n + z * h, c
    return ((given + before).relu() if layer.nonlinearity == "relu" else (given + before).tanh()), c


def recurred(layer: nn.Module, inputs: Tensor | PackedSequence, first: Any = None) -> dict[str, Tensor]:
    """The inputs of each weight of nn.LSTM, nn.GRU or nn.RNN, sequence by sequence and step by step."""
    if isinstance(inputs, PackedSequence):
        padded, lengths = pad_packed_sequence(inputs, batch_first=True)
        sequences = [sequence[:length] for sequence, length in zip(padded, lengths.tolist(), strict=True)]
    else:
        sequences = list(inputs if layer.batch_first else inputs.transpose(0, 1))
    found = {}
    for number in range(layer.num_layers):
        outputs = [[] for _ in sequences]
        for direction, name in enumerate(("", "_reverse") if layer.bidirectional else ("",)):
            suffix, states = f"_l{number}{name}", []
            place = number * (2 if layer.bidirectional else 1) + direction
            for index, sequence in enumerate(sequences):
                h, c = (torch.zeros(size) for size in (layer.proj_size or layer.hidden_size, layer.hidden_size))
                if first is not None:
                    h, c = (part[place, index] for part in (first if isinstance(first, tuple) else (first, first)))
                results: list[Any] = [None] * len(sequence)
                for t in reversed(range(len(sequence))) if direction else range(len(sequence)):
                    states.append(h)
                    h, c = step(layer, sequence[t], h, c, suffix)
                    results[t] = h
                outputs[index].append(torch.stack(results))
            found[f"weight_ih{suffix}"], found[f"weight_hh{suffix}"] = torch.cat(sequences), torch.stack(states)
        sequences = [torch.cat(both, dim=1) for both in outputs]
    return found


@torch.no_grad()
def gathered(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any] = run_model) -> dict:
    """The inputs of every convolution, recurrent and linear layer of a model, by the name of the weight: `Groups`."""
    seen: dict[str, Groups] = {}

    def record(name: str, groups: list[Tensor]) -> None:
        for group, tokens in zip(seen.setdefault(name, [[] for _ in groups]), groups, strict=True):
            group.append(tokens.detach().clone())

    def watch(name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [*args, *kwargs.values()]
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            record(f"{name}.weight", unfolded(layer, given[0]))
        elif isinstance(layer, nn.RNNBase):
            for own, tokens in recurred(layer, *given[:2]).items():
                record(f"{name}.{own}", [tokens])
        elif isinstance(layer, nn.RNNCellBase):
            state = given[1][0] if isinstance(given[1], tuple) else given[1]
            record(f"{name}.weight_ih", [given[0]])
            record(f"{name}.weight_hh", [state])
        elif isinstance(layer, nn.Linear):
            record(f"{name}.weight", [given[0].reshape(-1, given[0].shape[-1])])

    layers = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: watch(name, layer, args, kwargs), with_kwargs=True
        )
        for name, layer in layers
    ]
    try:
        for batch in batches:
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def matrix_of(model: nn.Module, name: str) -> Tensor:
    """A copy of a weight as (out, in); a convolution's columns are ordered by channel, then by position."""
    return model.get_parameter(name).detach().clone(memory_format=torch.contiguous_format).flatten(1)


def side_by_side(parameter: Tensor) -> np.ndarray:
    """The columns of a convolution's matrix, ordered by position, so that M of them are channels of one position."""
    channels, positions = parameter.shape[1], parameter[0, 0].numel()
    return np.array([channel * positions + position for position in range(positions) for channel in range(channels)])


def scores_of(matrix: Tensor, groups: Groups | None) -> np.ndarray:
    """Wanda's scores, group by group of the rows; magnitudes if there are no inputs."""
    if groups is None:
        return reference_scores(matrix.numpy(), None)
    parts = matrix.chunk(len(groups))
    norms = [squared_norm_of([tokens.float() for tokens in inputs]) for inputs in groups]
    return np.concatenate(
        [reference_scores(part.float().numpy(), norm) for part, norm in zip(parts, norms, strict=True)]
    )


def check_mask(mask: Tensor, parameter: Tensor, scores: np.ndarray, **selection: Any) -> None:
    """Check that a mask follows from scores; N:M runs along the channels of one kernel position."""
    order = slice(None)
    if selection.get("pattern") and parameter.ndim > 2:
        order = side_by_side(parameter)
    assert_mask(mask[:, order], scores[:, order], ROUNDING, **selection)


def check_model(
    dense: nn.Module,
    pruned: nn.Module,
    result: Any,
    inputs_of: Callable[[nn.Module], dict[str, Groups]],
    stages: Iterable[Iterable[str]] | None = None,
    score: str = "wanda",
    **selection: Any,
) -> None:
    """Check that every mask follows from passes of the whole model, pruned up to the previous stage, and that all other
    weights are unchanged.

    Args:
        dense: A copy from before the pruning; becomes the pruned model.
        pruned: The model after it.
        result: Of the pruning.
        inputs_of: A function that returns the inputs of the weights of a model.
        stages: The names of the masks that are chosen from the same passes; by default all at once.
        score: "wanda" or "magnitude".
        selection: Of `reference_mask`.
    """
    stages = [list(result.masks)] if stages is None else [list(names) for names in stages]
    assert sorted(result.masks) == sorted(name for names in stages for name in names)
    for names in stages:
        inputs = inputs_of(dense) if score == "wanda" else {}
        for name in names:
            parameter = dense.get_parameter(name)
            scores = scores_of(matrix_of(dense, name), inputs[name] if score == "wanda" else None)
            check_mask(result.masks[name], parameter, scores, **selection)
        for name in names:
            kept = matrix_of(dense, name).masked_fill(~result.masks[name], 0)
            dense.get_parameter(name).data.copy_(kept.view(dense.get_parameter(name).shape))
    untouched(dense, pruned)


def untouched(expected: nn.Module, model: nn.Module) -> None:
    """Check that two models of one structure have the same values, bit for bit."""
    for (name, value), (other, own) in zip(expected.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, own), name


def asked_for(sparsity: float, result: Any, granularity: str = "output") -> tuple[int, int]:
    """(weights, zeros) that all masked matrices of a model should have."""
    weights = zeros = 0
    for mask in result.masks.values():
        rows, columns = mask.shape
        units, size = {"output": (rows, columns), "input": (columns, rows), "layer": (1, rows * columns)}[granularity]
        weights, zeros = weights + mask.numel(), zeros + units * int(size * sparsity + 1e-9)
    return weights, zeros


@functools.cache
def images(count: int = 4, size: int = 16, channels: int = 3) -> Tensor:
    """Noise: (count, channels, size, size)."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(3))


def by_groups(matrix: Tensor, groups: Groups) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each group and all their inputs, (tokens, in)."""
    size = len(matrix) // len(groups)
    for number, inputs in enumerate(groups):
        yield slice(number * size, (number + 1) * size), torch.cat(inputs)
