"""Recurrent layers: the matrices that multiply the inputs x_t of each step, and those that multiply the states h_(t-1).

torch.lstm and similar functions compute all layers in one call, which shows neither the states within a layer nor the
inputs of the next. They are recomputed here with the same functions, one layer and direction at a time, without
dropout between layers, as in evaluation.

The projection of an LSTM with `proj_size` (weight_hr) multiplies states that no function returns: it stays dense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.pruning.layers.base import Handler, PrunableWeight, See, is_dense

_NAMES = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_NAMES_PACKED = ("data", "batch_sizes", *_NAMES[1:-1])
_NAMES_CELL = ("input", "hx", "w_ih", "w_hh")
# Not weight_hr, and not the parameters from which weight_norm and the like compute a weight (weight_hh_l0_v).
_SEEN = re.compile(r"weight_(ih|hh)(_l\d+(_reverse)?)?")


def matrices(module: nn.Module) -> list[PrunableWeight]:
    """The weights of an nn.LSTM, nn.GRU, nn.RNN or one of their cells.

    >>> [weight.name for weight in matrices(nn.GRU(3, 4))]
    ['weight_ih_l0', 'weight_hh_l0']
    """
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return []
    return [
        PrunableWeight(name, parameter, (module,))
        for name, parameter in module.named_parameters(recurse=False)
        if _SEEN.fullmatch(name) and is_dense(parameter)
    ]


class _Call:
    """Recomputes one call of torch.lstm or a similar function layer by layer. Direction 0 is forwards, 1 backwards.

    Everything is computed on demand, so that it uses the weights as they are then: some may have been pruned.
    """

    def __init__(self, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
        self.function, self.has_biases, self.layers = function, given["has_biases"], given["num_layers"]
        self.batch_sizes = given.get("batch_sizes")  # of packed inputs, on the CPU: the number of sequences per step
        self.directions = 2 if given["bidirectional"] else 1
        # h, and c of an LSTM, before the first step: (layers * directions, batch, hidden) each
        self.states = (given["hx"],) if isinstance(given["hx"], Tensor) else tuple(given["hx"])
        params = list(given["params"])
        each = len(params) // (self.layers * self.directions)
        # For each layer and direction: weight_ih, weight_hh and the remaining parameters.
        self.weights = [params[start : start + each] for start in range(0, len(params), each)]
        self.inputs = given["data" if self.batch_sizes is not None else "input"]
        # The inputs of the layers computed so far: (steps, batch, in), or packed (steps of all sequences, in)
        self.known = [self.inputs.transpose(0, 1) if given.get("batch_first") else self.inputs]

    @torch.no_grad()
    def tokens(self, layer: int) -> Iterator[Tensor]:
        """The inputs that weight_ih of a layer multiplies: (tokens, in), sequence by sequence unless packed."""
        return self._flat(self._inputs_of(layer))

    @torch.no_grad()
    def hidden_tokens(self, layer: int, direction: int) -> Iterator[Tensor]:
        """The states that weight_hh of a layer multiplies, in the order of the inputs of the same steps."""
        outputs = self._outputs(layer, direction)
        first = self.states[0][layer * self.directions + direction].to(outputs.dtype)
        if self.batch_sizes is None:
            before = torch.cat([first[None], outputs[:-1]])
        else:
            sizes = self.batch_sizes.tolist()
            # The longest sequences come first, so those that continue are the first ones of the previous step.
            going_on = [step[:size] for step, size in zip(outputs.split(sizes), sizes[1:], strict=False)]
            before = torch.cat([first, *going_on])
        return self._flat(self._reversed(before, direction))

    def _inputs_of(self, layer: int) -> Tensor:
        while len(self.known) <= layer:
            below, directions = len(self.known) - 1, range(self.directions)
            self.known.append(torch.cat([self._reversed(self._outputs(below, d), d) for d in directions], dim=-1))
        return self.known[layer]

    def _outputs(self, layer: int, direction: int) -> Tensor:
        """The outputs of a layer in one direction, in the order of that direction's steps."""
        place = layer * self.directions + direction
        states = tuple(state[place : place + 1].contiguous() for state in self.states)
        steps = self._reversed(self._inputs_of(layer), direction)
        sizes, batch_first = ((), (False,)) if self.batch_sizes is None else ((self.batch_sizes,), ())
        settings = (self.has_biases, 1, 0.0, False, False)  # one layer, no dropout, no training, one direction
        hx = states if len(states) > 1 else states[0]
        return self.function(steps, *sizes, hx, self.weights[place], *settings, *batch_first)[0]

    def _reversed(self, steps: Tensor, direction: int) -> Tensor:
        """For direction 1, each sequence reversed; for direction 0 unchanged."""
        if direction == 0:
            return steps
        return steps.flip(0) if self.batch_sizes is None else steps[_reversed_places(self.batch_sizes).to(steps.device)]

    def _flat(self, steps: Tensor) -> Iterator[Tensor]:
        # Sequence by sequence, the order of the samples and their padding masks.
        by_sequence = steps.transpose(0, 1) if self.batch_sizes is None else steps
        return iter([by_sequence.detach().reshape(-1, steps.shape[-1])])


def _reversed_places(batch_sizes: Tensor) -> Tensor:
    """The rows of packed sequences in the order that reverses each sequence: (steps of all sequences,) indices.

    >>> _reversed_places(torch.tensor([2, 1, 1])).tolist()  # two sequences have a first step, one has three steps
    [3, 1, 2, 0]
    """
    real = torch.arange(int(batch_sizes[0])) < batch_sizes[:, None]  # (steps, sequences)
    lengths, starts = real.sum(dim=0), batch_sizes.cumsum(0) - batch_sizes
    step, sequence = real.nonzero(as_tuple=True)  # in the order of the rows
    return starts[lengths[sequence] - 1 - step] + sequence


def _recur(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], see: See) -> Any:
    second = args[1] if len(args) > 1 else kwargs.get("batch_sizes")
    packed = isinstance(second, Tensor) and not second.is_floating_point()
    given = {**dict(zip(_NAMES_PACKED if packed else _NAMES, args, strict=False)), **kwargs}
    call = _Call(function, given)
    by_sequence = packed or given.get("batch_first")
    this = object()  # unique per call: the states depend on the weights and first states, not only on the inputs
    for layer in range(call.layers):
        own = call.weights[layer * call.directions : (layer + 1) * call.directions]
        key = (this, layer) if layer else None if by_sequence else "by sequence"
        for weight_ih, *_ in own:
            see(weight_ih, call.inputs, tokens=partial(call.tokens, layer) if key else None, key=key)
        for direction, (_, weight_hh, *_) in enumerate(own):
            tokens = partial(call.hidden_tokens, layer, direction)
            see(weight_hh, call.inputs, tokens=tokens, key=(this, layer, direction))
    return function(*args, **kwargs)


def _recur_once(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], see: See) -> Any:
    given = {**dict(zip(_NAMES_CELL, args, strict=False)), **kwargs}
    hx = given["hx"]
    see(given["w_ih"], given["input"])
    see(given["w_hh"], hx if isinstance(hx, Tensor) else hx[0])  # h and c of an LSTM
    return function(*args, **kwargs)


PRODUCTS: dict[Callable[..., Any], Handler] = {
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recur),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _recur_once),
}
"""The functions that the layers and cells call as torch._VF.*, for packed and unpacked sequences."""
