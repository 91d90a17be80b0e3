"""Times the updates of weights and the refinement of masks, for the linear layers of one LLaMA-7B block.

    python scripts/benchmarks/methods_gpu.py --device cuda
    python scripts/benchmarks/methods_gpu.py --hidden 256 --threads 2

The inputs are random, but resemble those of large language models: correlated, with a power-law spectrum and a few far
larger features. Weights with the same inputs are stacked, as in `prune`. The times do not contain forward passes and
Gram matrices. The column for the model is 32 times that of the block. Errors are summed over the block, relative to
Wanda's masks without an update. For some rows of each layer, least squares is compared with the exact solution.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from sparsefit.pruning.gram import reconstruction_error
from sparsefit.pruning.least_squares import least_squares
from sparsefit.pruning.refinement import swap
from sparsefit.pruning.selection import Granularity, Products, select, select_n_of_m
from sparsefit.pruning.weight_updates import (
    inverse_factor,
    prune_iteratively,
    update_sequentially,
)

BLOCKS = 32
SWAPS = 10
DAMPING = 0.01
OUTPUT, HALF = Granularity("output"), Fraction(1, 2)


def block_shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the stacked weights of a block, by name."""
    wide = hidden * 43 // 16  # 11,008 for 4,096
    return {"qkv": (3 * hidden, hidden), "o": (hidden, hidden), "gate, up": (2 * wide, hidden), "down": (hidden, wide)}


def correlated_gram(inputs: int, power: float, device: str) -> Tensor:
    """The Gram matrix of activations whose spectrum follows a power law; one feature in 500 is 30 times as large."""
    directions = torch.linalg.qr(torch.randn(inputs, inputs, device=device)).Q
    spectrum = torch.arange(1.0, inputs + 1, device=device).pow(-power / 2)
    tokens = torch.randn(4 * inputs, inputs, device=device).mul_(spectrum) @ directions.T
    size = torch.randn(inputs, device=device).mul_(0.5).exp_()
    size[torch.randperm(inputs, device=device)[: inputs // 500 + 1]] *= 30
    tokens = tokens.mul_(size).double()
    return (tokens.T @ tokens).float()


def sparsegpt_choose(inputs: int, outputs: int) -> Callable[[Tensor, slice, Tensor], Tensor]:
    """A function that removes half of each block of columns, over all rows, by SparseGPT's score."""
    count = inputs * outputs // 2

    def choose(block: Tensor, columns: slice, diagonal: Tensor) -> Tensor:
        due = count * columns.stop // inputs - count * columns.start // inputs
        return select(block.square().div_(diagonal.square()), Granularity("input", 128), due)

    return choose


class Clock:
    """Adds up the seconds of steps with the same name."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = torch.device(device), defaultdict(float)

    def __call__(self, name: str, step: Callable[..., object], *arguments: object) -> object:
        """Run a step and wait for the device."""
        self._wait()
        start = time.perf_counter()
        result = step(*arguments)
        self._wait()
        self.seconds[name] += time.perf_counter() - start
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def two_of_four(weights: Tensor, _: slice, diagonal: Tensor) -> Tensor:
    """Two of every four go, by SparseGPT's score; on a GPU the kernel chooses them itself."""
    return select_n_of_m(weights.square().div_(diagonal.square()), 2, 4)


def run_layer(clock: Clock, weight: Tensor, gram: Tensor, exact_rows: int) -> dict[str, float]:
    """Run and time every method on a layer. Returns the squared errors by the names of the methods."""
    scores = Products(weight, gram.diagonal().sqrt())
    mask, mask_2_4 = select(scores, OUTPUT, HALF), select_n_of_m(scores, 2, 4)
    factor = clock("inverse factor", inverse_factor, gram, DAMPING)
    values = {
        "no update": weight.float() * mask,
        "SparseGPT": clock("SparseGPT", prune_iteratively, weight, factor, sparsegpt_choose(*weight.shape[::-1]))[1],
        "SparseGPT 2:4": clock("SparseGPT 2:4", prune_iteratively, weight, factor, two_of_four, 128, 4, 2)[1],
        "sequential update": clock("sequential update", update_sequentially, weight, mask, factor),
        "ten swaps": weight.float() * clock("ten swaps", swap, weight, mask, gram, SWAPS),
        "no update 2:4": weight.float() * mask_2_4,
        "ten swaps 2:4": weight.float() * clock("ten swaps 2:4", swap, weight, mask_2_4, gram, SWAPS, (2, 4)),
        "least squares": clock("least squares", least_squares, weight, mask, gram, DAMPING)[0],
    }
    some = slice(0, exact_rows)
    solved = least_squares(weight[some], mask[some], gram, DAMPING)[0]
    found = reconstruction_error(weight[some], values["least squares"][some], gram).sum()
    exact = reconstruction_error(weight[some], solved, gram).sum()
    print(f"  {tuple(weight.shape)}: least squares over the exact solution, {exact_rows} rows: {found / exact:.5f}")
    return {name: float(clock("error", reconstruction_error, weight, new, gram).sum()) for name, new in values.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=4096, help="width of the model")
    parser.add_argument("--power", type=float, default=1.5, help="of the law that the inputs' spectrum follows")
    parser.add_argument("--exact-rows", type=int, default=8, help="of each layer, that are solved exactly")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, hidden {args.hidden}, spectrum k^-{args.power:g}", flush=True)
    clock, errors = Clock(args.device), defaultdict(float)
    # A small layer first, which compiles kernels and loads libraries.
    run_layer(Clock(args.device), torch.randn(256, 512, device=args.device), correlated_gram(512, 1, args.device), 8)
    for shape in block_shapes(args.hidden).values():
        weight = torch.randn(shape, device=args.device).mul_(0.02).bfloat16()
        for name, error in run_layer(
            clock, weight, correlated_gram(shape[1], args.power, args.device), args.exact_rows
        ).items():
            errors[name] += error
    print(f"{'':>18} {'s a block':>10} {'s for 32':>9} {'error':>8}")
    for name in dict.fromkeys([*clock.seconds, *errors]):
        spent = clock.seconds.get(name, 0.0)
        share = f"{errors[name] / errors['no update']:8.4f}" if name in errors else ""
        print(f"{name:>18} {spent:10.3f} {BLOCKS * spent:9.1f} {share}", flush=True)


if __name__ == "__main__":
    main()
