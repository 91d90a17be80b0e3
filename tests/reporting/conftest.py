from __future__ import annotations

import copy
import math
import random

import pytest

LINEARS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (688, 256),
    "mlp.up_proj": (688, 256),
    "mlp.down_proj": (256, 688),
}


def llama_layers(blocks: int = 6) -> list[dict]:
    layers = []
    for block in range(blocks):
        for name, (rows, columns) in LINEARS.items():
            zeros = rows * (columns // 2)
            entry = {"name": f"model.layers.{block}.{name}.weight", "shape": [rows, columns], "zeros": zeros}
            layers.append(entry | {"weights": rows * columns, "sparsity": zeros / (rows * columns)})
    return layers


def training_history(points: int = 200) -> list[dict]:
    noise = random.Random(0)
    return [
        {
            "step": step + 1,
            "gpu_hours": 0.0075 + 0.031 * (step + 1) / points,
            "loss": 3.1 + 0.5 * math.exp(-step / 40) + noise.gauss(0, 0.06),
            "learning_rate": 1e-3 * (1 - step / points),
        }
        for step in range(points)
    ]


def build_report() -> dict:
    layers = llama_layers()
    weights, zeros = (sum(layer[key] for layer in layers) for key in ("weights", "zeros"))
    return {
        "name": "tiny-llama-wanda-50",
        "status": "finished",
        "created": "2025-06-01T12:34:56+00:00",
        "folder": "runs/tiny-llama-wanda-50",
        "command": "sparsefit fit --config configs/tiny_llama.yaml --trainer.max_steps 200",
        "metrics": {"perplexity": "lower"},
        "perplexity": {"dense": 18.25, "pruned": 26.75, "recovered": 20.5},
        "evaluation": {"text": "held-out documentation, 412 windows of 256 tokens"},
        "sparsity": {
            "asked": 0.5,
            "pattern": None,
            "total": zeros / weights,
            "zeros": zeros,
            "weights": weights,
            "by_type": {},
            "layers": layers,
            "counted_on": "base/model.safetensors",
            "coverage": 0.4,
            "overall_sparsity": 0.2,
        },
        "pruning": {
            "config": {"sparsity": 0.5, "pattern": None, "score": "wanda", "granularity": "output", "update": "block"},
            "update": "block",
            "digest": "sha256:" + "0123456789abcdef" * 4,
            "samples": 128,
            "tokens": 32768,
            "seconds": 4.25,
            "notes": ["statistics of q_proj, k_proj and v_proj are shared: they read the same input"],
            "left_dense": {"lm_head.weight": "tied to the embedding", "model.embed_tokens.weight": "an embedding"},
        },
        "training": {
            "steps": 200,
            "stop_reason": "gpu_hours budget reached",
            "trainable_parameters": 49152,
            "history": training_history(),
        },
        "gpu_hours": {
            "total": 0.0415,
            "budget": 0.05,
            "devices": 1,
            "stages": {
                "evaluation": 0.0042,
                "calibration": 0.0012,
                "pruning": 0.0021,
                "training": 0.031,
                "export": 0.003,
            },
        },
        "seconds": {
            "total": 149.4,
            "stages": {"evaluation": 15.1, "calibration": 4.25, "pruning": 7.6, "training": 111.6, "export": 10.8},
        },
        "memory": {"peak_bytes": 1610612736, "kind": "process memory (CPU)"},
        "configuration": "seed_everything: 0\ntrainer:\n  max_steps: 200\n  callbacks:\n    - WandaPruning\n",
        "versions": {"python": "3.12.1", "torch": "2.8.0", "lightning": "2.6.0"},
        "machine": {
            "platform": "Linux",
            "cpu": "Some CPU @ 3 GHz",
            "cpu_count": 2,
            "memory_bytes": 8 * 2**30,
            "devices": [],
        },
    }


def timeline(metric: str, values: dict[str, float], validations: int = 12) -> list[dict]:
    """Stages at the moments of `training_history`, and validations that go from the pruned to the recovered value."""
    hours = {"dense": 0.002, "pruned": 0.0055, "reconstructed": 0.0075, "recovered": 0.0398, "merged": 0.0415}
    moments = [
        {"stage": stage, "gpu_hours": hours[stage], "step": 200 * (hours[stage] > 0.03), "value": value}
        for stage, value in values.items()
    ]
    start, end = values["pruned"], values.get("recovered", values["pruned"])
    for index in range(validations):
        share = (index + 1) / validations
        value = 0.97 * (end + (start - end) * math.exp(-4 * share))
        spent = 0.0075 + 0.031 * share
        moments.append({"stage": "validation", "gpu_hours": spent, "step": round(200 * share), "value": value})
    return [moment | {"metric": metric} for moment in sorted(moments, key=lambda moment: moment["gpu_hours"])]


def reconstructed_report() -> dict:
    report = build_report() | {"name": "reconstructed and merged"}
    report["perplexity"] = report["perplexity"] | {"reconstructed": 22.5, "merged": 20.5}
    order = ("dense", "pruned", "reconstructed", "recovered", "merged")
    report["timeline"] = timeline("perplexity", {stage: report["perplexity"][stage] for stage in order})
    errors = [(0.04 + 0.02 * block, 0.02 + 0.01 * block) for block in range(6)]
    report["reconstruction"] = {
        "passes": 3,
        "learning_rate": 1e-3,
        "seconds": 12.0,
        "blocks": [
            {"block": f"model.layers.{block}", "before": before, "after": after, "steps": 48, "seconds": 2.0}
            for block, (before, after) in enumerate(errors)
        ],
    }
    report["merge"] = {
        "form": "masked_lora",
        "lossless": True,
        "folder": "model",
        "sparsity": 0.5,
        "perplexity": 20.5,
    }
    return report


def controlled_report() -> dict:
    report = build_report() | {"name": "with a control"}
    report["perplexity"] = report["perplexity"] | {"control": 16.0}
    report["control"] = {
        "status": "finished",
        "steps": 200,
        "gpu_hours": 0.025,
        "seconds": 90.0,
        "without_teacher": True,
        "distance": {"perplexity": math.log(20.5 / 16.0)},
    }
    return report


def interrupted_report() -> dict:
    report = build_report() | {
        "name": "interrupted",
        "status": "interrupted",
        "perplexity": {"dense": 18.25, "pruned": 26.75},
    }
    report["training"] = {"steps": 57, "stop_reason": "interrupted by the user", "history": training_history()[:57]}
    report["gpu_hours"] = {
        "total": 0.0164,
        "budget": 0.05,
        "devices": 1,
        "stages": {"evaluation": 0.002, "training": 0.009},
    }
    return report | {"memory": None, "configuration": None}


def untrained_report() -> dict:
    report = build_report() | {
        "name": "pruned only",
        "perplexity": {"dense": 7.26, "pruned": 8123.4, "recovered": None},
    }
    del report["training"]
    report["gpu_hours"] = {
        "total": 0.0063,
        "budget": None,
        "devices": 1,
        "stages": {"evaluation": 0.0042, "pruning": 0.0021},
    }
    return report


def accuracy_report() -> dict:
    report = build_report() | {"name": "convnext", "metrics": {"accuracy": "higher"}}
    del report["perplexity"], report["evaluation"]
    report["accuracy"] = {"dense": 0.8412, "pruned": 0.7931, "recovered": 0.8307}
    report["timeline"] = timeline("accuracy", report["accuracy"], validations=3)
    layers = []
    for stage, depth in enumerate((3, 3, 9, 3)):
        for block in range(depth):
            for name, shape in (("mlp.fc1", (384, 96)), ("mlp.fc2", (96, 384))):
                share = 0.4 + 0.1 * stage + 0.01 * block
                entry = {"name": f"stages.{stage}.blocks.{block}.{name}.weight", "shape": list(shape)}
                layers.append(entry | {"weights": 36864, "zeros": int(36864 * share), "sparsity": share})
    weights, zeros = (sum(layer[key] for layer in layers) for key in ("weights", "zeros"))
    report["sparsity"] = {"asked": 0.6, "total": zeros / weights, "weights": weights, "zeros": zeros, "layers": layers}
    return report


def plain_report() -> dict:
    report = build_report() | {"name": "plain network"}
    layers = [
        {"name": f"net.{i}.weight", "shape": [64, 64], "weights": 4096, "zeros": 2048, "sparsity": 0.5}
        for i in (0, 2, 4)
    ]
    report["sparsity"] = {"asked": 0.5, "total": 0.5, "weights": 12288, "zeros": 6144, "layers": layers}
    report["gpu_hours"] = report["gpu_hours"] | {"budget": 0.03}
    return report


KINDS = {
    "finished": build_report,
    "interrupted": interrupted_report,
    "untrained": untrained_report,
    "accuracy": accuracy_report,
    "plain": plain_report,
    "reconstructed": reconstructed_report,
    "controlled": controlled_report,
    "empty": dict,
}


@pytest.fixture
def report() -> dict:
    return copy.deepcopy(build_report())


@pytest.fixture
def reconstructed() -> dict:
    return reconstructed_report()


@pytest.fixture
def controlled() -> dict:
    return controlled_report()


@pytest.fixture(params=list(KINDS))
def any_report(request: pytest.FixtureRequest) -> dict:
    return KINDS[request.param]()
