from __future__ import annotations

import json
import math

import torch
from safetensors.torch import load_file, save_file


def test_a_rate_that_breaks_the_model_ends_the_run_and_nothing_broken_is_left(sparsefit, recipe, tmp_path):
    del recipe["model"]["init_args"]["adapter"]
    recipe["model"]["init_args"]["learning_rate"] = 1e38
    recipe["trainer"]["max_steps"] = 20
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert (status, "DivergenceError: " in errors, "Traceback" in errors) == (2, True, False)
    assert "Lower the learning rate" in errors
    run = tmp_path / "run"
    assert json.loads((run / "report.json").read_text())["status"] == "failed"
    states = [torch.load(file, weights_only=True)["state_dict"] for file in run.rglob("*.ckpt")]
    states += [load_file(file) for file in run.rglob("model.safetensors")]
    assert states
    assert all(bool(tensor.isfinite().all()) for state in states for tensor in state.values())
    assert sparsefit("inspect", run)[0] == 0


def test_inspect_and_export_look_for_what_is_not_finite(sparsefit, recipe, tmp_path):
    assert sparsefit("prune", recipe=recipe)[0] == 0
    file = tmp_path / "run/base/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:3] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "run/base/SHA256SUMS").unlink()  # changed on purpose
    status, output, _ = sparsefit("inspect", tmp_path / "run")
    assert (status, "model.norm.weight: 3 numbers are NaN or infinite" in output) == (1, True)
    status, _, errors = sparsefit("export", tmp_path / "run", "--output", tmp_path / "out", "--format", "gguf")
    assert (status, "DivergenceError: " in errors, "model.norm.weight (3)" in errors) == (2, True, True)
    assert not (tmp_path / "out").exists()
