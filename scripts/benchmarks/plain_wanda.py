"""A plain implementation of Wanda (Sun et al. 2023, arXiv 2306.11695), as baseline and reference.

    python scripts/benchmarks/plain_wanda.py --layers 4 --samples 8 --length 128

It prunes block after block and runs one sample at a time. In a first pass with dense weights, a hook of every linear
layer sums the squares of its inputs. Each row of scores is sorted, and the weights with the smallest scores become
zero. A second pass computes the inputs of the next block. The other benchmarks use it as baseline. It shares no code
with the engine, so it is also an independent reference: the command prunes a model with both and prints the share of
equal mask bits, with micro-batches of one sample in the engine (which gives the same sums) and with its default.
"""

from __future__ import annotations

import argparse
import copy
from decimal import Decimal
from typing import Any

import torch
from common import add_size_options, make_model, make_samples  # in this folder
from torch import Tensor, nn

from sparsefit import PruningConfig, prune


@torch.no_grad()
def prune_plainly(model: nn.Module, samples: list[Tensor], sparsity: float = 0.5, pattern: str | None = None) -> None:
    """Prune a transformers Llama (or a model of its layout) in place.

    Args:
        model: Its blocks are `model.model.layers`, each called with the hidden state first.
        samples: Token ids, each (1, length).
        sparsity: Share of each row that is removed.
        pattern: "N:M" keeps N of every M consecutive weights of a row instead.
    """
    model.eval()
    hidden, arguments = first_block_inputs(model, samples)
    for block in model.model.layers:
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        squared_norms = [torch.zeros(layer.in_features, device=layer.weight.device) for layer in layers]
        hooks = [
            layer.register_forward_pre_hook(sums_squares(sums))
            for layer, sums in zip(layers, squared_norms, strict=True)
        ]
        for inputs, kwargs in zip(hidden, arguments, strict=True):
            block(inputs, **kwargs)
        for hook in hooks:
            hook.remove()
        for layer, sums in zip(layers, squared_norms, strict=True):
            scores = layer.weight.float().abs() * sums.sqrt()
            layer.weight[smallest(scores, sparsity, pattern)] = 0
        for index, kwargs in enumerate(arguments):
            output = block(hidden[index], **kwargs)
            hidden[index] = output[0] if isinstance(output, tuple) else output


class _FirstBlockReached(Exception):
    """Ends a pass of the model at its first block."""


def first_block_inputs(model: nn.Module, samples: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The hidden state and the other arguments with which the model calls its first block, for each sample."""
    hidden, arguments = [], []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        arguments.append(kwargs)
        raise _FirstBlockReached

    hook = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for sample in samples:
        try:
            model(sample, use_cache=False)
        except _FirstBlockReached:
            continue
    hook.remove()
    return hidden, arguments


def sums_squares(sums: Tensor) -> Any:
    """A hook that adds the squares of a layer's inputs, over all tokens, to (in,) sums in float32."""

    def hook(layer: nn.Module, args: tuple[Tensor]) -> None:
        sums.add_(args[0].reshape(-1, len(sums)).float().square().sum(dim=0))

    return hook


def smallest(scores: Tensor, sparsity: float, pattern: str | None) -> Tensor:
    """(out, in) bool: True for the smallest scores of each comparison group; of equal ones, the leftmost come first."""
    if pattern is not None:
        n, m = map(int, pattern.split(":"))
        groups, count = scores.reshape(-1, m), m - n
    else:
        groups, count = scores, int(scores.shape[1] * Decimal(str(sparsity)))
    order = torch.sort(groups, dim=1, stable=True).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :count], True).view_as(scores)


def kept_weights(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a pruned model, by parameter name: True where a weight of its blocks is not zero."""
    return {
        f"{name}.weight": layer.weight != 0
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and ".layers." in f".{name}."
    }


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, hidden=256, layers=4, samples=8, length=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense = make_model(args.hidden, args.layers, args.dtype)
    samples = make_samples(args.samples, args.length)
    reference = copy.deepcopy(dense)
    prune_plainly(reference, samples, args.sparsity, args.pattern)
    expected = kept_weights(reference)
    default = PruningConfig().micro_batch_size
    print(f"{sum(mask.numel() for mask in expected.values()):,} weights, {args.samples} x {args.length} tokens")
    for micro_batch_size in (1, default):
        config = PruningConfig(sparsity=args.sparsity, pattern=args.pattern, micro_batch_size=micro_batch_size)
        masks = prune(copy.deepcopy(dense), samples, config).masks
        different = sum(int((masks[name] != mask).sum()) for name, mask in expected.items())
        total = sum(mask.numel() for mask in expected.values())
        share = 1 - different / total
        print(f"micro_batch_size={micro_batch_size}: {different} of {total} mask bits differ, {share:.6%} are equal")


if __name__ == "__main__":
    main()
