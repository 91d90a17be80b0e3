from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from recorded_inputs import spread, watch, weights_of
from torch import Tensor, nn

from sparsefit.pruning.input_watch import watching
from sparsefit.pruning.layers import matrices_of
from sparsefit.pruning.layers.base import PrunableWeight


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "linear by name": lambda x, w: F.linear(weight=w, input=x),
    "@": lambda x, w: x @ w.t(),
    "torch.matmul": lambda x, w: torch.matmul(x, w.mT),
    "matmul by name": lambda x, w: torch.matmul(input=x, other=w.mT),
    "method matmul": lambda x, w: x.matmul(w.t()),
    "mm": lambda x, w: x.mm(w.T),
    "addmm": lambda x, w: torch.addmm(torch.zeros(len(w)), x, w.t()),
    "the other way round": lambda x, w: (w @ x.t()).t(),
}


def stack_weights(stack: nn.Parameter, name: str, transposed: bool = False) -> list[PrunableWeight]:
    return [PrunableWeight(f"{name}[{i}]", stack, (), transposed, i) for i in range(len(stack))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_with_a_view_of_a_stack_are_seen(product: str, transposed: bool):
    # Two stacks in one storage, neither at its start.
    storage = torch.randn(7 + 2 * 4 * 5 * 3)
    first, second = (
        nn.Parameter(storage[start : start + 60].view(4, *((3, 5) if transposed else (5, 3)))) for start in (7, 67)
    )
    x = torch.randn(2, 3)

    def run() -> list[Tensor]:
        matrices = [stack.mT[2] if transposed else stack[2] for stack in (first, second)]
        return [PRODUCTS[product](x, part) for w in matrices for part in (w, w[1:3], w[4:], w.clone())]

    plain = run()
    weights = stack_weights(first, "first", transposed) + stack_weights(second, "second", transposed)
    outputs, records = watch(weights, run)
    assert [(record.name, record.rows) for record in records] == [
        (f"{name}[2]", rows) for name in ("first", "second") for rows in (None, (1, 3), (4, 5))
    ]
    assert all(record.tokens.equal(x) for record in records)
    assert all(a.equal(b) for a, b in zip(plain, outputs, strict=True))


@pytest.mark.parametrize(
    "product",
    [
        torch.bmm,
        torch.matmul,
        lambda x, w: torch.baddbmm(torch.zeros(4, 2, 5), x, w),
        lambda x, w: torch.bmm(input=x, mat2=w),
    ],
    ids=["bmm", "matmul", "baddbmm", "bmm by name"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_with_a_whole_stack_is_seen_expert_by_expert(product: Callable, transposed: bool):
    stack, x = nn.Parameter(torch.randn(4, *((3, 5) if transposed else (5, 3)))), torch.randn(4, 2, 3)
    x[1] = 0  # its tokens are routed elsewhere
    x[2, 1] = 0
    weights = stack_weights(stack, "stack", transposed)
    _, records = watch(weights, lambda: product(x, stack if transposed else stack.mT))
    seen = {record.name: record.tokens for record in records if len(record.tokens)}
    assert list(seen) == ["stack[0]", "stack[2]", "stack[3]"]
    for name, tokens in zip(seen, (x[0], x[2, :1], x[3]), strict=True):
        assert seen[name].equal(tokens)


def test_products_with_other_tensors_are_not_seen():
    stack, other = nn.Parameter(torch.randn(4, 5, 3)), nn.Parameter(torch.randn(4, 5, 3))
    x = torch.randn(2, 3)

    def run() -> None:
        F.linear(x, other[1])
        F.linear(x, nn.Parameter(torch.randn(5, 3)))
        F.linear(x, stack[1, 0])
        F.linear(torch.randn(2, 2), stack[1, :, :2])
        F.linear(torch.randn(0, 3), stack[1])
        torch.bmm(torch.randn(4, 2, 3), other.mT)
        torch.bmm(torch.randn(0, 2, 3), torch.randn(0, 3, 5))
        torch.randn(3, 4).to_sparse() @ torch.randn(4, 3)
        torch.randn(3, 4) @ torch.randn(4, 3).to_sparse()
        torch.randn(3) @ torch.randn(3)
        torch.randn(2, 2, 3, 3) @ torch.randn(2, 2, 3, 3)

    assert watch(stack_weights(stack, "stack"), run)[1] == []


# Layers


class Packed(torch.autograd.Function):
    """A product by a kernel of one's own."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.mm.default(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])


class OwnKernel(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Packed.apply(x, self.weight)


class OwnProduct(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btf,of->bto", 2 * x, self.weight) + F.linear(2 * x, self.weight)


class Lent(nn.Module):
    """A layer that is never called: its weight is lent to a product elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(3 * x, self.layer.weight)


@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        (lambda: nn.Linear(6, 4), 1),
        (lambda: nn.Linear(6, 4, bias=False), 1),
        (lambda: OwnKernel(6, 4), 1),
        (lambda: OwnProduct(6, 4), 2),
        (lambda: Lent(), 3),
    ],
    ids=["linear", "no bias", "own kernel", "own product", "lent"],
)
def test_what_a_layer_multiplies_is_seen_once_whoever_computes_it(layer: Callable[[], nn.Module], factor: int):
    module, x = spread(layer()), torch.randn(2, 5, 6)
    with torch.no_grad():
        plain = module(x)
    outputs, records = watch(weights_of(module), lambda: module(x))
    assert outputs.equal(plain)
    assert [record.rows for record in records] == [None]
    assert records[0].inputs.equal(factor * x)
    assert records[0].tokens.equal(factor * x.flatten(0, 1))


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer(x=x)], ids=["position", "name"])
def test_each_call_of_a_layer_with_a_kernel_of_its_own_counts(call: Callable):
    first, second = spread(OwnKernel(6, 4)), spread(OwnKernel(6, 4))
    second.weight = first.weight
    weight = PrunableWeight("shared", first.weight, (first, second), called=True)
    inputs = [torch.randn(2, 5, 6) for _ in range(3)]
    calls = list(zip((first, second, first, first), [*inputs, torch.randn(0, 5, 6)], strict=True))
    _, records = watch([weight], lambda: [call(layer, x) for layer, x in calls])
    assert [record.name for record in records] == ["shared"] * 3
    assert all(record.inputs.equal(x) for record, x in zip(records, inputs, strict=True))


def test_conv1d_of_gpt2_is_seen():
    from transformers.pytorch_utils import Conv1D

    layer, x = spread(Conv1D(4, 6)), torch.randn(2, 5, 6)
    ((name, rows, _, tokens),) = watch(matrices_of(layer, "fc"), lambda: layer(x))[1]
    assert (name, rows) == ("fc.weight", None)
    assert tokens.equal(x.flatten(0, 1))


def test_layers_of_bitsandbytes_are_seen_by_their_call():
    quantized_layers = pytest.importorskip("quantized_layers")
    for kind in quantized_layers.KINDS:
        layer, x = quantized_layers.make_layer(kind), torch.randn(2, 5, 128)
        with torch.no_grad():
            plain = layer(x)
        outputs, records = watch(matrices_of(layer, "fc"), lambda layer=layer, x=x: layer(x))
        assert outputs.equal(plain)
        assert [(record.name, record.rows) for record in records] == [("fc.weight", None)]
        assert records[0].tokens.equal(x.flatten(0, 1))


def test_no_hook_stays_whatever_happens():
    model, x = spread(nn.Sequential(nn.Linear(6, 6), OwnKernel(6, 6))), torch.randn(2, 3, 6)
    calls = []

    def fail(seen: object) -> None:
        calls.append(seen)
        raise ValueError("not finite")

    for layer in model:
        calls.clear()
        with pytest.raises(ValueError, match="not finite"), watching(weights_of(layer), fail):
            model(x)
        assert len(calls) == 1
        model(x)
        assert len(calls) == 1
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
