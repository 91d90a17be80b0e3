"""Records the digests of the masks that the engine chooses, or compares them with recorded ones.

    python scripts/mask_digests.py --record digests.json
    python scripts/mask_digests.py --compare digests.json

To check that a rewrite changes no mask: record before it and compare after it, on the same machine (another processor
may round matrix products differently). The models are the small ones of the tests, the language model of the package
and `tinystories656K`, if the folder `--data` has it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/pruning")]

from image_models import MODELS, image_model, images  # noqa: E402
from moe import FAMILIES, SIZES  # noqa: E402
from reference_inputs import spread_weights  # noqa: E402
from tiny_models import ARCHITECTURES  # noqa: E402

from sparsefit import PruningConfig, prune  # noqa: E402
from sparsefit.modules.loading import load_tokenizer  # noqa: E402

METHODS: list[dict[str, Any]] = [
    {},
    {"sparsity": 0.57},
    {"pattern": "2:4"},
    {"pattern": "4:8"},
    *({"score": score} for score in ("magnitude", "wanda_l1", "wanda_linf", "ria", "sparsegpt")),
    *({"granularity": granularity} for granularity in ("layer", "input", "(output, 3)", "(input, 5)", "variant")),
    {"score": "magnitude", "granularity": "output", "pattern": "2:4"},
    {"allocation": "uniform", "sparsity": 0.61},
    {"allocation": "owl", "sparsity": 0.6},
    {"swaps": 5},
    {"swaps": 5, "pattern": "2:4"},
    {"reconstruction": "sequential"},
    {"reconstruction": "least_squares"},
    {"reconstruction": "least_squares", "swaps": 3, "granularity": "layer"},
    {"score": "sparsegpt", "reconstruction": "iterative"},
    {"score": "sparsegpt", "reconstruction": "iterative", "pattern": "2:4"},
    {"reconstruction": "iterative", "allocation": "owl"},
]
Subject = tuple[Callable[[], nn.Module], list[Any]]
load = transformers.AutoModelForCausalLM.from_pretrained


def subjects(data: Path | None) -> Iterator[tuple[str, Subject]]:
    """Yields the name of each model, a function that creates it, and its batches."""
    ids = torch.randint(3, 61, (6, 12), generator=torch.Generator().manual_seed(1))
    padded = {"input_ids": ids, "attention_mask": (torch.arange(12) < torch.arange(7, 13)[:, None]).long()}
    for name, (family, head, settings) in ARCHITECTURES.items():
        config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
        batches = [padded, {"input_ids": ids[:3]}]
        if name == "t5":
            batches = [{**batch, "labels": batch["input_ids"][:, :5]} for batch in batches]
        cls = getattr(transformers, family + head)
        yield name, (lambda cls=cls, config=config, s=settings: spread_weights(cls(config(**s))), batches)
    for name, settings in FAMILIES.items():
        cls, config = getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")
        make = lambda cls=cls, config=config, s=settings: spread_weights(cls(config(**(SIZES | s))))  # noqa: E731
        yield name, (make, [{"input_ids": ids}])
    for name in MODELS:
        yield name, (lambda name=name: image_model(name), [images()])
    plain = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    tokens = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(3))
    yield "nn.TransformerEncoder", (lambda: spread_weights(nn.TransformerEncoder(plain, 2)), [tokens])
    folders = [ROOT / "src/sparsefit/assets/tiny_llama", *([data / "tinystories656K"] if data else [])]
    text = "\n".join(sorted(path.read_text() for path in (ROOT / "src/sparsefit/data").glob("*.py")))
    for folder in filter(Path.is_dir, folders):
        tokens = torch.tensor(load_tokenizer(str(folder))(text, verbose=False)["input_ids"][: 8 * 64]).view(8, 64)
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{folder.name} {dtype}", (partial(load, folder, dtype=dtype), [{"input_ids": tokens}])


def digests(data: Path | None, only: str) -> dict[str, dict[str, str]]:
    """The order used and the digests of masks and weights, by model and method."""
    torch.manual_seed(0)
    found = {}
    for name, (make, batches) in subjects(data):
        if only not in name:
            continue
        for update in ("block", "none"):
            for method in METHODS:
                key = json.dumps([name, update, method])
                model = make()
                try:
                    result = prune(model, batches, PruningConfig(update=update, **method))
                except ValueError as error:
                    found[key] = {"error": type(error).__name__}
                    continue
                sha = hashlib.sha256()
                for parameter in model.parameters():
                    sha.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
                found[key] = {"update": result.update, "masks": result.masks.digest(), "weights": sha.hexdigest()}
        print(name, len(found), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--only", default="", help="part of a model's name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    now = digests(args.data, args.only)
    if args.record:
        args.record.write_text(json.dumps(now, indent=0))
    if args.compare:
        before = {key: value for key, value in json.loads(args.compare.read_text()).items() if key in now}
        for what in ("error", "update", "masks", "weights"):
            others = [key for key in before if before[key].get(what) != now[key].get(what)]
            print(f"{what}: {len(before) - len(others)} of {len(before)} are the same")
            for key in others[:20]:
                print("   ", key)


if __name__ == "__main__":
    main()
