"""Weights that no layer of their own multiplies, and their inputs: stacked experts, nn.MultiheadAttention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Record = Callable[[nn.Parameter, int | None, slice | None, Tensor], None]

# The products that experts are computed with, and the names of their tensors; the weight is the last of them.
_PRODUCTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight"),
    torch.matmul: ("input", "other"),
    Tensor.matmul: ("input", "other"),
    torch.mm: ("input", "mat2"),
    Tensor.mm: ("input", "mat2"),
    torch.bmm: ("input", "mat2"),
    Tensor.bmm: ("input", "mat2"),
    torch.addmm: ("input", "mat1", "mat2"),
    torch.baddbmm: ("input", "batch1", "batch2"),
}
_ATTENTION = inspect.signature(F.multi_head_attention_forward)


def find_stacks(module: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """The stacked expert weights of one module, not of the modules in it.

    Returns:
        The name in the module, the parameter and whether it is stored (experts, in, out) instead of
        (experts, out, in), for each; nothing if this is no module of experts whose layout is known.
    """
    stacks = {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and _is_dense(parameter)
    }
    transposed = _stored_transposed(module, stacks) if stacks else None
    return [] if transposed is None else [(name, parameter, transposed) for name, parameter in stacks.items()]


def _is_dense(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.element_size() > 1  # one byte: 8-bit floats with scales


def _stored_transposed(module: nn.Module, stacks: Mapping[str, nn.Parameter]) -> bool | None:
    # What transformers' decorator for modules of experts (use_experts_implementation) sets on each of them.
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool) and hasattr(module, "has_gate") and "down_proj" in stacks:
        return declared
    # Experts without the decorator (Llama 4, LongCat, Step 3): gate and up are twice as wide as what down takes,
    # so the shapes fit one of the layouts only.
    if {"gate_up_proj", "down_proj"} <= stacks.keys():
        _, first, second = stacks["down_proj"].shape
        layouts = {(2 * second, first): False, (second, 2 * first): True}
        return layouts.get(tuple(stacks["gate_up_proj"].shape[1:]))
    # One stack by itself, as in JetMoe and others after ScatterMoE, which say what its dimensions are.
    sizes = tuple(getattr(module, name, None) for name in ("num_experts", "output_size", "input_size"))
    return False if "weight" in stacks and tuple(stacks["weight"].shape) == sizes else None


def find_attention_weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of one nn.MultiheadAttention with their names in it; nothing for any other module.

    They are `in_proj_weight`, (3E, E) with the rows of query, key and value one after the other, or else
    `q_proj_weight`, `k_proj_weight` and `v_proj_weight`; and `out_proj.weight`.
    """
    # PEFT puts a layer of its own in the place of out_proj, and computes all weights anew in each pass.
    if not isinstance(module, nn.MultiheadAttention) or not isinstance(module.out_proj, nn.Linear):
        return []
    parameters = dict(module.named_parameters())
    separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    names = (*(separate if separate[0] in parameters else ("in_proj_weight",)), "out_proj.weight")
    # A parametrization, too, computes a weight anew: the name then is no parameter.
    if not all(name in parameters and _is_dense(parameters[name]) for name in names):
        return []
    return [(name, parameters[name]) for name in names]


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Have the transformers models in a module compute their experts one after the other, as FusedInputs can see.

    Models without such a switch are left alone. Everything is as before afterwards, whatever happens.
    """
    switchable = [
        module
        for module in model.modules()
        if callable(getattr(module, "get_experts_implementation", None))
        and callable(getattr(module, "set_experts_implementation", None))
    ]
    before = [(module, module.get_experts_implementation()) for module in switchable]
    try:
        for module in switchable:
            module.set_experts_implementation("eager")
        yield
    finally:
        for module, implementations in before:  # from the outside in: each sets the models in it, too
            module.set_experts_implementation(implementations)


class FusedInputs(TorchFunctionMode):
    """While active, sees the inputs of weights that are used inside functions instead of layers.

    Each is handed to `record` just before it is multiplied by the weight, so that a weight that `record` changes
    in place is used as changed. Stacked experts are seen where each is multiplied by its own tokens (see
    `eager_experts`) or all are multiplied at once by as many inputs; the weights of nn.MultiheadAttention where
    F.multi_head_attention_forward is called, which its fast path passes by.

    Args:
        parameters: Stacks of experts (three dimensions) and weights of nn.MultiheadAttention (two).
        record: Called with the parameter, the index in a stack (None: it is no stack), the rows of the (out, in)
            matrix that get these inputs (None: all) and the inputs, (..., in). Of sequences they are
            (batch, tokens, in). Inputs that are one tensor in the model are one tensor here. Not called for
            an expert without tokens.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], record: Record) -> None:
        super().__init__()
        parameters = list(parameters)
        self.record = record
        self._stacks = [parameter for parameter in parameters if parameter.ndim == 3]
        self._matrices = {id(parameter) for parameter in parameters if parameter.ndim == 2}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._stacks and func in _PRODUCTS:
            self._see_product(func, args, kwargs)
        elif self._matrices and func is F.multi_head_attention_forward:
            return self._attend(args, kwargs)
        return func(*args, **kwargs)

    def _see_product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = _PRODUCTS[func]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        inputs, weight = given.get(names[-2]), given.get(names[-1])
        if not isinstance(inputs, Tensor) or type(weight) not in (Tensor, nn.Parameter):
            return
        if type(weight) is nn.Parameter and weight.ndim == 2:  # a layer's own weight, as in most products
            return
        if weight.ndim not in (2, 3) or weight.layout is not torch.strided or not weight.numel():
            return
        matrix = weight if func is F.linear else weight.mT  # (out, in) or (experts, out, in)
        if matrix.ndim == 2:
            self._see(inputs, matrix)
        elif inputs.ndim == 3 and self._place(matrix[0]) is not None:
            for tokens, expert in zip(inputs, matrix, strict=True):
                # Tokens that are routed elsewhere come as zeros (Llama 4).
                self._see(tokens[tokens.any(dim=-1)], expert)

    def _see(self, inputs: Tensor, matrix: Tensor) -> None:
        place = self._place(matrix) if inputs.numel() else None
        if place is not None:
            self.record(*place, inputs)

    def _place(self, matrix: Tensor) -> tuple[nn.Parameter, int, slice | None] | None:
        """Where an (out, in) matrix lies in the stacks: parameter, index and rows (None: all)."""
        address = matrix.data_ptr()
        for stack in self._stacks:
            # By address, as neither the storage nor an offset in it is a stack's own.
            offset = address - stack.data_ptr()
            if not 0 <= offset < stack.nbytes or matrix.device != stack.device or matrix.dtype != stack.dtype:
                continue
            offset //= stack.element_size()
            index, rest = divmod(offset, stack.stride(0))
            for expert in (stack[index], stack[index].t()):
                if matrix.stride() == expert.stride() and matrix.shape[1] == expert.shape[1]:
                    first = rest // expert.stride(0)
                    rows = slice(first, first + len(matrix))
                    return stack, index, None if len(matrix) == len(expert) else rows
        return None

    def _attend(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        call = _ATTENTION.bind(*args, **kwargs)
        given = call.arguments
        self._see_projections(given)
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if id(weight) not in self._matrices:
            return F.multi_head_attention_forward(*args, **kwargs)
        # The identity in the weight's place gives the input of the weight.
        given["out_proj_weight"] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        given["out_proj_bias"] = None
        inputs, attention = F.multi_head_attention_forward(*call.args, **call.kwargs)
        self.record(weight, None, None, _batch_first(inputs))
        outputs = F.linear(inputs.flatten(0, -2), weight, bias)  # flat as in the function itself
        return outputs.unflatten(0, inputs.shape[:-1]), attention

    def _see_projections(self, given: Mapping[str, Any]) -> None:
        tensors = [given[name] for name in ("query", "key", "value")]
        inputs = {id(tensor): _batch_first(tensor) for tensor in tensors}
        packed = given["in_proj_weight"]
        if given.get("use_separate_proj_weight"):
            for name, tensor in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tensors, strict=True):
                if id(given[name]) in self._matrices:
                    self.record(given[name], None, None, inputs[id(tensor)])
        elif id(packed) in self._matrices and len(inputs) == 1:
            self.record(packed, None, None, inputs[id(tensors[0])])
        elif id(packed) in self._matrices:
            size = len(packed) // 3
            for part, tensor in enumerate(tensors):
                self.record(packed, None, slice(part * size, (part + 1) * size), inputs[id(tensor)])


def _batch_first(inputs: Tensor) -> Tensor:
    """(tokens, batch, in) as (batch, tokens, in); (tokens, in) as it is."""
    return inputs.transpose(0, 1) if inputs.ndim == 3 else inputs
