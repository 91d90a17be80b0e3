"""Prunes the package's model to 50%, calibrated on real text or on text that it writes itself, and prints a table.

    python scripts/benchmarks/own_text.py --c4 data/c4_sample/c4_train_1000.jsonl
    python scripts/benchmarks/own_text.py --c4 FILE --seeds 1 --samples 8 --test-windows 4    # to try it

Perplexities on Python's documentation (the part for tests) and on C4 (the records from 900 on), 256 tokens a window.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from statistics import mean, stdev

import torch
from torch.utils.data import DataLoader

from sparsefit import PruningConfig, prune
from sparsefit.data import PythonDocsDataModule, SelfGeneratedDataModule, TextFilesDataModule
from sparsefit.evaluation import perplexity
from sparsefit.modules.loading import load_causal_lm

MODEL, LENGTH = "tiny-llama", 256


def calibrations(model: torch.nn.Module, c4: str, samples: int, seed: int, folder: str) -> dict[str, DataLoader]:
    """Calibration data by name."""
    settings = {"calibration_samples": samples, "sequence_length": LENGTH, "seed": seed}
    own = settings | {"train_tokens": 1, "folder": folder}
    data = {
        "Python's documentation": PythonDocsDataModule(MODEL, calibration="pack", **settings),
        "C4": TextFilesDataModule(MODEL, f"{c4}[:900]", calibration="pack", **settings),
        "its own text": SelfGeneratedDataModule(MODEL, **own),
        "its own, after 8 tokens of documentation": SelfGeneratedDataModule(
            MODEL, prompts="python-docs:calibration", prompt_tokens=8, **own
        ),
    }
    for module in data.values():
        if isinstance(module, SelfGeneratedDataModule):
            module.write_with(model)
    return {name: module.calibration_dataloader() for name, module in data.items()}


def main() -> None:
    """Prune and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--c4", required=True, help="C4 as JSON lines, at least 1,000 records")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense, settings = load_causal_lm(MODEL), {"sequence_length": LENGTH, "test_windows": options.test_windows}
    tests = [
        list(PythonDocsDataModule(MODEL, **settings).test_dataloader()),
        list(TextFilesDataModule(MODEL, options.c4, test_source=f"{options.c4}[900:]", **settings).test_dataloader()),
    ]
    print("| calibrated on | Python's documentation | C4 |\n|---|---|---|")
    print("| dense |", " | ".join(f"{perplexity(dense, batches):.2f}" for batches in tests), "|", flush=True)
    found: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for name, batches in calibrations(dense, options.c4, options.samples, seed, folder).items():
                pruned = copy.deepcopy(dense)
                prune(pruned, batches, PruningConfig(sparsity=0.5))
                found.setdefault(name, []).append([perplexity(pruned, test) for test in tests])
    for name, rows in found.items():
        cells = [
            f"{mean(each):.2f}" + (f" ± {stdev(each):.2f}" if len(each) > 1 else "") for each in zip(*rows, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
