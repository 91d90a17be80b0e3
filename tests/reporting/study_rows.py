"""Studies as the engine writes them, for the tests of their report: image classifiers and a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

METRICS = {"accuracy": "higher", "top5_accuracy": "higher"}
SHARP = {"magnitude": 0.62, "wanda": 0.72, "ria": 0.735}  # where a score's accuracy falls by half


def row(model: str, stage: str = "dense", **known: Any) -> dict[str, Any]:
    empty = {"score": "", "granularity": "", "update": "none", "pattern": "", "sparsity": 0.0, "epochs": 0, "error": ""}
    times = {"selection_seconds": None, "evaluation_seconds": 4.2, "finetuning_seconds": None}
    own = {"counted": known.get("sparsity", 0.0), "digest": "" if stage == "dense" else "5f1e0c"}
    return {"model": model, "stage": stage} | empty | times | own | known


def pruned(score: str = "wanda", sparsity: float = 0.5, model: str = "deit", **known: Any) -> dict[str, Any]:
    way = {"stage": "pruned", "granularity": "layer", "score": score, "sparsity": sparsity}
    return row(model, **(way | known))


def plain(text: str) -> str:
    """The text without typographic signs."""
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{MULTIPLICATION SIGN}", "x")


def accuracies(dense: float, score: str, granularity: str, sparsity: float, tuned: bool = False) -> dict[str, float]:
    middle = SHARP[score] + (0.03 if granularity == "layer" else 0.0) + (0.14 if tuned else 0.0)
    value = dense / (1 + math.exp((sparsity - middle) / 0.055))
    return {"accuracy": round(value, 4), "top5_accuracy": round(1 - (1 - value) * 0.42, 4)}


def vision_rows(
    models: tuple[str, ...] = ("convnext-tiny", "deit-small"),
    scores: tuple[str, ...] = ("magnitude", "wanda", "ria"),
    granularities: tuple[str, ...] = ("output", "layer"),
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8),
    epochs: int = 2,
) -> Iterator[dict[str, Any]]:
    for index, model in enumerate(models):
        dense = 0.8213 - 0.0231 * index
        yield row(model, accuracy=dense, top5_accuracy=0.953)
        points = [(s, g, share, "") for s in scores for g in granularities for share in sparsities]
        points += [(s, "", 0.5, "2:4") for s in scores]
        for score, granularity, sparsity, pattern in points:
            way = {"score": score, "granularity": granularity, "sparsity": sparsity, "pattern": pattern}
            effective = sparsity + (0.09 if pattern else 0.0)
            values = accuracies(dense, score, granularity, effective)
            yield row(model, "pruned", **way, **values, selection_seconds=0.31)
            if epochs and granularity == granularities[-1]:
                tuned = accuracies(dense, score, granularity, effective, tuned=True)
                yield row(model, "finetuned", **way, **tuned, epochs=epochs, finetuning_seconds=63.0)


def vision_study(models: tuple[str, ...] = ("convnext-tiny", "deit-small")) -> dict[str, Any]:
    known = {
        "class": "ConvNextForImageClassification",
        "parameters": 28_589_128,
        "prunable": 25_509_888,
        "left_dense": {"classifier.weight": "the head", "embeddings.patch_embeddings.weight": "the patch embedding"},
        "calibration": {"source": "training images", "samples": 4096, "seconds": 21.4},
        "training": {"epochs": 12, "seconds": 903.0},
        "notes": ["statistics of query, key and value are shared: they read the same input"],
    }
    return {
        "name": "image classifiers: wanda, magnitude and ria",
        "created": "2025-06-01T12:34:56+00:00",
        "command": "sparsefit study --config configs/vision_study.yaml",
        "folder": "runs/vision-study",
        "metrics": dict(METRICS),
        "models": {model: dict(known) for model in models},
        "finetuning": {"epochs": 2, "learning_rate": 1e-4},
        "seconds": {
            "calibration": 42.8,
            "selection": 16.7,
            "evaluation": 310.0,
            "finetuning": 1890.0,
            "training": 1806.0,
            "other": 12.0,
        },
        "versions": {"python": "3.12.1", "torch": "2.8.0"},
        "machine": {"platform": "Linux", "cpu": "Some CPU @ 3 GHz", "memory_bytes": 8 * 2**30, "devices": []},
        "config": "name: vision\ngrid:\n  scores: [magnitude, wanda, ria]\n",
    }


def text_rows() -> list[dict[str, Any]]:
    """A language model: magnitude in one order, two other scores in two; magnitude explodes, one value is infinite."""
    rows = [row("tiny-llama", perplexity=12.4)]
    steepness = {"magnitude": 34.0, "wanda": 13.0, "sparsegpt": 11.0}
    for score, steep in steepness.items():
        granularity = "layer" if score == "magnitude" else "output"
        for update in ("none",) if score == "magnitude" else ("none", "block"):
            for sparsity in (0.3, 0.5, 0.6, 0.7, 0.8):
                value = 12.4 * math.exp(steep * (0.93 if update == "block" else 1.0) * max(0.0, sparsity - 0.28) ** 2)
                value = math.inf if score == "magnitude" and sparsity == 0.8 else value
                way = {"score": score, "granularity": granularity, "update": update, "sparsity": sparsity}
                rows.append(row("tiny-llama", "pruned", **way, perplexity=value, selection_seconds=2.5))
        rows.append(
            row(
                "tiny-llama", "pruned", score=score, pattern="2:4", sparsity=0.5, perplexity=12.4 + steep, update="none"
            )
        )
    return rows


def text_study() -> dict[str, Any]:
    known = {"class": "LlamaForCausalLM", "parameters": 4_212_480, "prunable": 3_145_728, "left_dense": {}}
    return vision_study() | {
        "name": "language model",
        "metrics": {"perplexity": "lower"},
        "models": {"tiny-llama": known | {"calibration": {"source": "c4", "samples": 128, "seconds": 9.0}}},
        "finetuning": None,
        "seconds": {"calibration": 9.0, "selection": 80.0, "evaluation": 120.0},
    }
