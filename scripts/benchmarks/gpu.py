"""Compares complete pruning runs of a large model on a GPU: every method and the plain algorithm, in one table.

    python scripts/benchmarks/gpu.py    # 32 blocks of LLaMA-7B, 128 x 2,048 tokens
    python scripts/benchmarks/gpu.py --layers 4 --ways plain block "block, micro-batch 1" none
    python scripts/benchmarks/gpu.py --device cpu --hidden 256 --layers 2 --samples 4 --length 64

Random weights in bfloat16 with a vocabulary of 4,096 tokens, and random inputs. "+GiB" is the peak memory of pruning
above the memory of the model and the data. "bits" is the share of mask bits that equal those of the plain algorithm: in
bfloat16, sums over other micro-batches are rounded differently. Goals are for one H100 or H200 at the full size.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from common import PeakMemory  # in this folder
from plain_wanda import kept_weights, prune_plainly
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.masks import pack_bits, unpack_bits

SPARSEGPT = {"score": "sparsegpt", "reconstruction": "iterative"}
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "block": {},
    "block, micro-batch 1": {"micro_batch_size": 1},
    "none": {"update": "none"},
    "2:4": {"pattern": "2:4"},
    "per layer": {"granularity": "layer"},
    "SparseGPT": SPARSEGPT,
    "SparseGPT 2:4": SPARSEGPT | {"pattern": "2:4"},
    "sequential": {"reconstruction": "sequential"},
    "10 swaps": {"swaps": 10},
    "10 swaps + least squares": {"swaps": 10, "reconstruction": "least_squares"},
}
GOALS = {"block": "0.9 of plain", "none": "0.5 of plain", "SparseGPT": "60 s", "10 swaps + least squares": "90 s"}


def make_llama(hidden: int, layers: int, device: str) -> nn.Module:
    """A Llama of LLaMA-7B's proportions, created on the device; its weights are the same in each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure(way: Callable[[nn.Module], object], args: argparse.Namespace) -> tuple[float, int, dict[str, Tensor]]:
    """Seconds, peak bytes above the model, and the packed masks of one pruning run."""
    model = make_llama(args.hidden, args.layers, args.device)
    with PeakMemory(args.device) as memory:
        start = time.perf_counter()
        way(model)
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, memory.above, {name: pack_bits(mask) for name, mask in kept_weights(model).items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
    print(
        f"torch {torch.__version__}, {where}, width {args.hidden}, {args.layers} blocks, bfloat16, "
        f"{args.samples} x {args.length} tokens",
        flush=True,
    )
    ids = torch.randint(4096, (args.samples, 1, args.length), generator=torch.Generator().manual_seed(0))
    samples = list(ids.to(args.device))
    start = time.perf_counter()
    for name in args.ways:  # loads libraries, compiles kernels
        run(WAYS[name])(make_llama(args.hidden, 1, args.device), samples[:1])
    print(f"warming up took {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{'':26} {'seconds':>8} {'of plain':>8} {'+GiB':>6} {'bits':>9}  goal")
    plain_seconds, plain_masks = None, {}
    for name in args.ways:
        gc.collect()
        seconds, above, masks = measure(lambda model, n=name: run(WAYS[n])(model, samples), args)
        if name == "plain":
            plain_seconds, plain_masks = seconds, masks
        ratio = f"{seconds / plain_seconds:8.2f}" if plain_seconds else f"{'-':>8}"
        total = 8 * sum(bits.numel() for bits in plain_masks.values())
        others = sum(int(unpack_bits(bits ^ masks[key], (8 * len(bits),)).sum()) for key, bits in plain_masks.items())
        share = f"{1 - others / total:9.4%}" if total else f"{'-':>9}"
        print(f"{name:26} {seconds:8.1f} {ratio} {above / 2**30:6.1f} {share}  {GOALS.get(name, '')}", flush=True)


def run(settings: dict[str, Any] | None) -> Callable[[nn.Module, list[Tensor]], object]:
    """The plain algorithm, or the engine with some settings."""
    if settings is None:
        return prune_plainly
    return lambda model, samples: prune(model, samples, PruningConfig(**settings))


if __name__ == "__main__":
    main()
