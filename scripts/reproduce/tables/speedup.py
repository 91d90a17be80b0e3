"""Compares products with 2:4 weights, for which GPUs since Ampere have units, with dense ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.benchmark import Timer

from sparsefit.recovery.semi_structured import HALF, MULTIPLES, backend_of, pack
from tables.layout import Table, markdown
from tables.pruned_models import PrunedModels
from tables.setup import Figures, Point, Setup
from tables.store import Store

Shape = tuple[int, int]  # (out, in)

TOKENS = 2048
OWN = "the model's"
SHAPES: dict[str, dict[str, Shape]] = {
    "LLaMA-7B": {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)},
    "LLaMA-65B (the paper's)": {"q, k, v, o": (8192, 8192), "gate, up": (22016, 8192), "down": (8192, 22016)},
}


def points(setup: Setup) -> list[Point]:
    """A point for the layers of each model."""
    return [setup.point("speedup", None, shape=name, tokens=TOKENS) for name in (*SHAPES, OWN)]


def measure(models: PrunedModels, point: Point) -> Figures:
    """Milliseconds of each product, dense and 2:4."""
    shapes = SHAPES.get(point["shape"]) or linear_shapes(models.dense())
    dtype = getattr(torch, point["dtype"]) if point["dtype"] in ("float16", "bfloat16") else HALF[0]
    device = torch.device(point["device"])
    backend, _ = backend_of(device)
    layers = {name: times(shape, device, dtype, backend, point["tokens"]) for name, shape in shapes.items()}
    return {"backend": backend, "gpu": torch.cuda.get_device_name(device), "layers": layers}


def linear_shapes(model: nn.Module) -> dict[str, Shape]:
    """The shapes of a model's linear layers by their names; layers of one name have one shape."""
    head = model.get_output_embeddings()
    named = ((name.rpartition(".")[2], module) for name, module in model.named_modules() if module is not head)
    return {name: tuple(module.weight.shape) for name, module in named if isinstance(module, nn.Linear)}


def times(shape: Shape, device: torch.device, dtype: torch.dtype, backend: str, tokens: int) -> Figures:
    """Milliseconds of one product of (tokens, in) inputs; none for a shape that the backend does not take."""
    rows, columns = MULTIPLES[backend]
    if shape[0] % rows or shape[1] % columns:
        return {"shape": shape}
    weight = torch.randn(shape, device=device, dtype=dtype)
    weight.view(-1, 4)[:, :2] = 0
    inputs = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    return {
        "shape": shape,
        "dense_ms": milliseconds(inputs, weight),
        "sparse_ms": milliseconds(inputs, pack(weight, backend)),
    }


def milliseconds(inputs: torch.Tensor, weight: torch.Tensor) -> float:
    """The median time of a product; torch's timer warms up and waits for the GPU."""
    with torch.inference_mode():
        timer = Timer("linear(x, w)", globals={"linear": nn.functional.linear, "x": inputs, "w": weight})
        return 1000 * timer.blocked_autorange(min_run_time=0.3).median


def render(setup: Setup, store: Store) -> str:
    """A line for each kind of layer."""
    lines = []
    for point in points(setup):
        for name, found in store[point]["layers"].items():
            line = [point["shape"], name, "{} x {}".format(*found["shape"])]
            if "dense_ms" in found:
                dense, sparse = found["dense_ms"], found["sparse_ms"]
                line += [f"{dense:.3f}", f"{sparse:.3f}", f"{dense / sparse:.2f}"]
            lines.append(line + ["-"] * (6 - len(line)))
    first = store[points(setup)[0]]
    note = f"{TOKENS:,} tokens, {first['gpu']}, {first['backend']}. A dash: the backend does not take this shape.\n"
    return markdown(["shapes of", "layer", "out x in", "dense ms", "2:4 ms", "speed-up"], lines) + f"\n{note}"


def problem(setup: Setup) -> str | None:
    """Why 2:4 products cannot be measured on this device."""
    backend, why = backend_of(torch.device(setup.device))
    return None if backend else why


TABLE = Table("Speed-up of 2:4 products", points, render, problem=problem)
