"""Experts of transformers 5: matrices in a stack, (experts, out, in), each multiplied by the tokens routed to it.

The inputs of each matrix of a stack are seen at its product, like those of any other weight (`linear`);
`eager_experts` makes the model compute one expert after another, so that there is such a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from sparsefit.pruning.layers.base import PrunableWeight, is_dense


def matrices(module: nn.Module) -> list[PrunableWeight]:
    """The matrices of a module's stacks, expert by expert, in the order in which they are computed.

    >>> import torch
    >>> experts = nn.ParameterDict({"down_proj": torch.zeros(2, 4, 3), "gate_up_proj": torch.zeros(2, 6, 4)})
    >>> [weight.name for weight in matrices(experts)]
    ['down_proj[0]', 'gate_up_proj[0]', 'down_proj[1]', 'gate_up_proj[1]']
    """
    stacks = find_stacks(module)
    return [
        PrunableWeight(f"{name}[{index}]", stack, (module,), transposed, index)
        for index in range(max((len(stack) for _, stack, _ in stacks), default=0))
        for name, stack, transposed in stacks
        if index < len(stack)  # LongCat has entries for identity experts in only one of its stacks
    ]


def find_stacks(module: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """The stacks of a module (not of its children) whose layout is known: name, parameter, and whether it is stored as
    (experts, in, out) instead of (experts, out, in).

    >>> import torch
    >>> experts = nn.ParameterDict({"down_proj": torch.zeros(2, 4, 3), "gate_up_proj": torch.zeros(2, 6, 4)})
    >>> [(name, transposed) for name, _, transposed in find_stacks(experts)]
    [('down_proj', False), ('gate_up_proj', False)]
    """
    own = module.named_parameters(recurse=False)
    stacks = {name: parameter for name, parameter in own if parameter.ndim == 3 and is_dense(parameter)}
    transposed = _stored_transposed(module, stacks) if stacks else None
    return [] if transposed is None else [(name, parameter, transposed) for name, parameter in stacks.items()]


def _stored_transposed(module: nn.Module, stacks: Mapping[str, nn.Parameter]) -> bool | None:
    # transformers' decorator for modules of experts (use_experts_implementation) sets these attributes.
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool) and hasattr(module, "has_gate") and "down_proj" in stacks:
        return declared
    # Experts without the decorator (Llama 4, LongCat, Step 3): gate and up are twice as wide as the input of down, so
    # the shapes fit only one of the layouts.
    if {"gate_up_proj", "down_proj"} <= stacks.keys():
        _, first, second = stacks["down_proj"].shape
        layouts = {(2 * second, first): False, (second, 2 * first): True}
        return layouts.get(tuple(stacks["gate_up_proj"].shape[1:]))
    # A single stack, as in JetMoe and others derived from ScatterMoE, whose attributes give its dimensions.
    sizes = tuple(getattr(module, name, None) for name in ("num_experts", "output_size", "input_size"))
    return False if "weight" in stacks and tuple(stacks["weight"].shape) == sizes else None


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Make the transformers models in a module compute their experts one after another, with transformers' own switch.

    >>> with eager_experts(nn.Linear(3, 5)) as held: print(held)  # a model without such a switch is left alone
    None
    """
    switch = ("get_experts_implementation", "set_experts_implementation")
    switchable = [module for module in model.modules() if all(callable(getattr(module, name, None)) for name in switch)]
    before = [(module, module.get_experts_implementation()) for module in switchable]
    try:
        for module in switchable:
            module.set_experts_implementation("eager")
        yield
    finally:
        for module, implementations in before:  # outermost first: each also sets the models inside it
            module.set_experts_implementation(implementations)
