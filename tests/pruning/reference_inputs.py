"""Collects the inputs of every weight by passes of the whole model, sample by sample, with plain hooks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference import reference_mask, reference_scores, squared_norm_of
from torch import Tensor, nn

Inputs = dict[str, list[Tensor]]  # by mask name: (tokens, in) of each sample
Run = Callable[[nn.Module, Any], Any]


def linear_layers(model: nn.Module, prefixes: Iterable[str] = ("",)) -> dict[str, nn.Module]:
    """The linear layers whose names start with one of the prefixes."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and any(name.startswith(f"{p}.") or p in ("", name) for p in prefixes)
    }


def matrix_of(model: nn.Module, name: str) -> Tensor:
    """The (out, in) view of the weight with a mask's name."""
    parameter, _, index = name.removesuffix("]").partition("[")
    owner = parameter.rpartition(".")[0]
    module, matrix = model.get_submodule(owner), model.get_parameter(parameter).detach()
    if index:
        matrix = matrix[int(index)]
    if matrix.ndim == 4:
        matrix = matrix[:, :, 0, 0]
    return matrix.t() if type(module).__name__ in ("Conv1D", "GptOssExperts") else matrix


def run_model(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(*sample) if isinstance(sample, tuple) else model(sample)


@torch.no_grad()
def collect(model: nn.Module, samples: Iterable[Any], run: Run = run_model) -> Inputs:
    """The inputs of all weights of linear layers, 1x1 convolutions, experts and nn.MultiheadAttention, in the order of
    their first use. Layers that share a weight have their inputs together under the first one's name."""
    seen: Inputs = {}
    names: dict[int, str] = {}
    handles = []

    def record(name: str, tokens: Tensor) -> None:
        seen.setdefault(name, []).append(tokens.reshape(-1, tokens.shape[-1]).clone())

    for name, module in model.named_modules():
        watch = _watcher(name, module, names, record)
        if watch is not None:
            handles.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for sample in samples:
            run(model, sample)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return seen


def _watcher(name: str, module: nn.Module, names: dict[int, str], record: Callable[[str, Tensor], None]):
    if type(module).__name__ in ("Linear", "Conv1D"):
        own = names.setdefault(id(module.weight), f"{name}.weight")
        return lambda layer, args, kwargs: record(own, args[0])
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
        return lambda layer, args, kwargs: record(f"{name}.weight", convolved(layer, args[0]))
    if isinstance(module, nn.MultiheadAttention):
        return lambda layer, args, kwargs: _record_attention(name, layer, args, kwargs, record)
    if {"gate_up_proj", "down_proj"} <= dict(module.named_parameters(recurse=False)).keys():
        return lambda layer, args, kwargs: _record_experts(name, layer, *args, *kwargs.values(), record=record)
    return None


def convolved(layer: nn.Conv2d, image: Tensor) -> Tensor:
    """The inputs of a 1x1 convolution, position by position: (tokens, channels)."""
    batched = image if image.ndim == 4 else image[None]
    patches = F.unfold(batched.float(), 1, padding=layer.padding, stride=layer.stride)
    return patches.transpose(1, 2).to(image.dtype)


def _record_experts(name: str, experts: nn.Module, hidden: Tensor, indices: Tensor, *_: Any, record: Callable) -> None:
    for expert in indices.unique().tolist():
        tokens = hidden[[expert in choices for choices in indices.tolist()]]
        record(f"{name}.gate_up_proj[{expert}]", tokens)
        record(f"{name}.down_proj[{expert}]", torch.stack([_down_input(experts, expert, token) for token in tokens]))


def _down_input(experts: nn.Module, index: int, token: Tensor) -> Tensor:
    """The input of one expert's second matrix, for one token."""
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: interleaved, clamped
        both = experts.gate_up_proj[index].t() @ token + experts.gate_up_proj_bias[index]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (half @ token for half in experts.gate_up_proj[index].chunk(2))
    return gate * torch.sigmoid(gate) * up


def _record_attention(name: str, module: nn.MultiheadAttention, args: tuple, kwargs: dict, record: Callable) -> None:
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    tensors = [given[part] if module.batch_first else given[part].transpose(0, 1) for part in ("query", "key", "value")]
    packed = module.in_proj_weight is not None
    for part, tensor in zip("qkv", tensors, strict=True):
        record(f"{name}.in_proj_weight/{part}" if packed else f"{name}.{part}_proj_weight", tensor)
    record(f"{name}.out_proj.weight", attended(module, *tensors, given.get("attn_mask"), given.get("key_padding_mask")))


def attended(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """The input of out_proj, head by head and sample by sample; all (batch, tokens, features)."""
    packed = module.in_proj_weight
    weights = packed.chunk(3) if packed is not None else [getattr(module, f"{part}_proj_weight") for part in "qkv"]
    biases = module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.t() + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    out = torch.zeros_like(q)
    for sample in range(len(q)):
        for start in range(0, q.shape[-1], module.head_dim):
            head = slice(start, start + module.head_dim)
            logits = q[sample, :, head] @ k[sample, :, head].t() / module.head_dim**0.5
            for mask in (hidden, None if padding is None else padding[sample]):
                if mask is not None:
                    logits = logits + (mask.float().masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask)
            out[sample, :, head] = logits.softmax(-1) @ v[sample, :, head]
    return out


def staged(
    dense: nn.Module,
    pruned: nn.Module,
    samples: Iterable[Any],
    stages: Iterable[Iterable[str]],
    run: Run = run_model,
) -> Iterator[tuple[str, Tensor, Tensor, list[Tensor]]]:
    """The (out, in) dense weight, its new values, and its inputs in a model that was pruned up to the previous stage.

    Args:
        dense: A copy from before the pruning; becomes the pruned model, stage by stage.
        pruned: The model after it.
        samples: Each of batch size 1 without padding.
        stages: The names of the masks that are chosen from the same passes: one block after the other for the
            paper's order, all at once for the statistics of the dense model. Those without inputs are left out.
    """
    samples = list(samples)
    for names in stages:
        inputs = collect(dense, samples, run)
        for name in names:
            if name in inputs:
                yield name, matrix_of(dense, name), matrix_of(pruned, name), inputs[name]
        for name in names:
            matrix_of(dense, name).copy_(matrix_of(pruned, name))


@torch.no_grad()
def reference_prune(
    model: nn.Module, samples: list[Mapping], stages: list[list[str]], **selection
) -> dict[str, np.ndarray]:
    """Wanda by passes of the whole model, one sample at a time, once for each stage.

    Args:
        model: In evaluation mode; pruned in place.
        samples: Each a mapping of batch size 1 without padding.
        stages: Names of the modules that are pruned together from the same passes: one block after the other
            for the paper's order, all at once for the statistics of the dense model.
        selection: Of `reference_mask`.

    Returns:
        Masks by parameter name, (out, in).
    """
    masks = {}
    for prefixes in stages:
        layers = linear_layers(model, prefixes)
        norms = squared_input_norms(model, samples, layers)
        for name in layers:
            weight = matrix_of(model, f"{name}.weight")
            masks[f"{name}.weight"] = reference_mask(reference_scores(weight.numpy(), norms[name]), **selection)
            weight.mul_(torch.from_numpy(masks[f"{name}.weight"]))
    return masks


@torch.no_grad()
def squared_input_norms(
    model: nn.Module, samples: list[Mapping], layers: Mapping[str, nn.Module]
) -> dict[str, np.ndarray]:
    norms: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name):
        return lambda layer, args: norms[name].append(args[0].reshape(-1, args[0].shape[-1]).clone())

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    for sample in samples:
        model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: squared_norm_of(inputs) for name, inputs in norms.items()}


def unseen_in(notes: Iterable[str]) -> set[str]:
    """The masks that notes list as chosen by magnitude, because their weights got no token."""
    found = set()
    for note in notes:
        match = re.fullmatch(r"(\S+)(?: of the experts ([\d, ]+))? saw no calibration token; pruned by magnitude", note)
        assert match, note
        found |= {f"{match[1]}[{number}]" for number in match[2].split(", ")} if match[2] else {match[1]}
    return found


def spread_weights(model: nn.Module) -> nn.Module:
    """Give a model random weights and biases that all matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def covered(model: nn.Module, result) -> bool:
    """Whether every matrix is either pruned or left dense for a reason."""
    matrices = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}
    reported = {matrices[name] for name in (*result.masks.parameters, *result.left_dense)}
    return reported == set(matrices.values()) and all(result.left_dense.values())
