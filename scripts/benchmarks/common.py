"""Common code of the benchmarks: the model, its samples, peak memory, and measurements in separate processes."""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 4096
# glibc returns the memory of larger tensors as soon as they are freed, so that the peak contains no memory that the
# allocator kept.
EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def add_size_options(parser: argparse.ArgumentParser, hidden: int, layers: int, samples: int, length: int) -> None:
    """Add the options that all benchmarks of pruning have."""
    parser.add_argument("--hidden", type=int, default=hidden, help="width of the model")
    parser.add_argument("--layers", type=int, default=layers, help="number of its blocks")
    parser.add_argument("--samples", type=int, default=samples, help="calibration samples")
    parser.add_argument("--length", type=int, default=length, help="tokens in each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", help="N:M instead of a sparsity")
    parser.add_argument("--threads", type=int, default=os.cpu_count())


def make_model(hidden: int, layers: int, dtype: str = "float32", device: str = "cpu") -> nn.Module:
    """A Llama with random weights, which depend only on its sizes; feed-forward layers are 8/3 as wide, heads 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device=device, dtype=getattr(torch, dtype)).eval()


def make_samples(count: int, length: int, device: str = "cpu") -> list[Tensor]:
    """Windows of the Python manual's text, each (1, length); filled with random tokens if the text is too short."""
    from pydoc_data.topics import topics

    from sparsefit.modules.loading import TINY_LLAMA, load_tokenizer

    text = "\n\n".join(topics.values())[: 8 * count * length]
    tokens = torch.tensor(load_tokenizer(TINY_LLAMA)(text, verbose=False)["input_ids"])
    missing = max(0, count * length - len(tokens))
    filler = torch.randint(VOCABULARY, (missing,), generator=torch.Generator().manual_seed(0))
    windows = torch.cat([tokens, filler])[: count * length].view(count, 1, length)
    return list(windows.to(device))


class PeakMemory:
    """Measures in a `with` block the peak memory of this process above the memory before it: bytes, in `above`."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.above = device, 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        status = Path("/proc/self/clear_refs")
        if status.exists():
            status.write_text("5")  # Linux: resets the peak, so that it does not contain the creation of the model
        self._before = _status("VmRSS") or _rusage_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
            self.above = torch.cuda.max_memory_allocated() - self._before
        else:
            self.above = (_status("VmHWM") or _rusage_peak()) - self._before


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _rusage_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_a_process(script: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a script in a separate process. Returns the JSON in the last line that it prints."""
    command, variables = [sys.executable, script, *arguments], {**os.environ, **(environment or {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    return json.loads(done.stdout.splitlines()[-1])
