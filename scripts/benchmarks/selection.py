"""Compares the time to choose the weights to prune with that of a stable sort of the same scores.

    python scripts/benchmarks/selection.py --threads 2
    python scripts/benchmarks/selection.py --device cuda --dtype bfloat16 --llama-7b
    python scripts/benchmarks/selection.py --dtype bfloat16 --llama-7b --blocks 1

The first command prints median times for single matrices: of this package, of `torch.sort(stable=True)` with a scatter
into the mask, and of one elementwise pass (abs into an existing tensor). It checks that the masks are identical, also
for scores with few distinct values. The others time all linear layers of LLaMA-7B, from weights and squared norms to
masks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from fractions import Fraction
from statistics import median

import torch
from torch import Tensor

from sparsefit.pruning.selection import Granularity, Products, Scores, select, select_n_of_m

HALF = Fraction(1, 2)
SHAPES = [(4096, 4096), (11008, 4096)]
LLAMA_7B_BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
GOALS_MS = {"per output 50%": 50, "per layer 50%": 100, "2:4": 15}

OURS: dict[str, Callable[[Scores], Tensor]] = {
    "per output 50%": lambda scores: select(scores, Granularity("output"), HALF),
    "per layer 50%": lambda scores: select(scores, Granularity("layer"), HALF),
    "2:4": lambda scores: select_n_of_m(scores, 2, 4),
    "4:8": lambda scores: select_n_of_m(scores, 4, 8),
}
GROUP_SIZE: dict[str, Callable[[Tensor], int]] = {
    "per output 50%": lambda scores: scores.shape[1],
    "per layer 50%": lambda scores: scores.numel(),
    "2:4": lambda scores: 4,
    "4:8": lambda scores: 8,
}


def by_sorting(scores: Tensor, size: int) -> Tensor:
    """The mask without the smaller half of each `size` consecutive scores, from a stable sort."""
    groups = scores.reshape(-1, size)
    order = groups.sort(dim=1, stable=True).indices
    mask = torch.ones_like(groups, dtype=torch.bool)
    return mask.scatter_(1, order[:, : size // 2], False).view(scores.shape)


def milliseconds(action: Callable[[], object], device: str, repeats: int) -> float:
    """Median of the repeats, after a first run that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds[1:])


def synchronize(device: str) -> None:
    """Wait for the work on a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def single_matrices(args: argparse.Namespace) -> None:
    """Print a line for each shape and kind of selection."""
    print(f"{'shape':>12} {'selection':>15} {'ours ms':>9} {'sort ms':>9} {'ratio':>6} {'x pass':>7}  identical (tied)")
    for shape in SHAPES:
        weight = torch.randn(shape, device=args.device)
        scores = weight.abs() * torch.randn(shape[1], device=args.device).exp()
        tied = weight.abs().mul_(4).round_()
        out = torch.empty_like(scores)
        one_pass = milliseconds(lambda s=scores, o=out: torch.abs(s, out=o), args.device, args.repeats)
        for name, ours in OURS.items():
            size = GROUP_SIZE[name](scores)
            fast = milliseconds(lambda f=ours, s=scores: f(s), args.device, args.repeats)
            slow = milliseconds(lambda k=size, s=scores: by_sorting(s, k), args.device, args.repeats)
            same = [torch.equal(ours(s), by_sorting(s, size)) for s in (scores, tied)]
            print(
                f"{shape[0]:>6}x{shape[1]:<5} {name:>15} {fast:9.1f} {slow:9.1f} {slow / fast:6.1f} "
                f"{fast / one_pass:7.1f}  {same[0]} ({same[1]})",
                flush=True,
            )


def llama_7b(args: argparse.Namespace) -> None:
    """All linears of LLaMA-7B: weights and squared norms in, masks out, one matrix after the other."""
    dtype = getattr(torch, args.dtype)
    matrices = [
        (torch.randn(shape, device=args.device, dtype=dtype), torch.rand(shape[1], device=args.device))
        for _ in range(args.blocks)
        for shape in LLAMA_7B_BLOCK
    ]
    numel = sum(weight.numel() for weight, _ in matrices)
    needed = numel * (dtype.itemsize + 1)  # each weight read, each byte of the mask written
    source = torch.empty(min(needed, 2**30), dtype=torch.uint8, device=args.device).fill_(1)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), args.device, args.repeats)
    bandwidth = 2 * source.numel() / copy  # bytes a millisecond
    print(f"{args.blocks} blocks of LLaMA-7B, {numel / 1e9:.2f} G weights in {args.dtype}, from weights to masks")
    print(f"memory-bandwidth limit {needed / bandwidth:.1f} ms (copies run at {bandwidth / 1e6:.0f} GB/s)")
    goal_share = args.blocks / 32
    for name, goal in GOALS_MS.items():

        def run(choose: Callable[[Products], Tensor]) -> None:
            for weight, squared_norm in matrices:
                choose(Products(weight, squared_norm.sqrt()))

        def sort(products: Products, size: Callable[[Tensor], int] = GROUP_SIZE[name]) -> Tensor:
            scores = products.scores()
            return by_sorting(scores, size(scores))

        fast = milliseconds(lambda r=run, n=name: r(OURS[n]), args.device, args.repeats)
        slow = milliseconds(lambda r=run, s=sort: r(s), args.device, 1)
        print(
            f"{name:>15}: ours {fast:.1f} ms, torch.sort {slow:.1f} ms, ratio {slow / fast:.1f}; on a GPU the goal is "
            f"{goal} ms for 32 blocks, {goal * goal_share:.2f} ms for {args.blocks}",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of --llama-7b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--llama-7b", action="store_true")
    parser.add_argument("--blocks", type=int, default=32)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, medians of {args.repeats}")
    (llama_7b if args.llama_7b else single_matrices)(args)


if __name__ == "__main__":
    main()
