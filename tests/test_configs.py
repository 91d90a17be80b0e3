"""The recipes of configs/ name classes and settings that there are."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from sparsefit.modules.recoverable import RecoverableModule
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings

FOLDER = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_says_how_it_is_run_and_fits_its_classes(file):
    text = file.read_text(encoding="utf-8")
    assert text.startswith(f"# sparsefit fit --config configs/{file.name}\n")
    recipe = yaml.safe_load(text)
    assert recipe["run"]["folder"] == f"runs/{file.stem}"
    for part in ("model", "data"):
        package, _, name = recipe[part]["class_path"].rpartition(".")
        found = getattr(import_module(package), name)
        known = set(inspect.signature(found).parameters)
        if part == "model":
            known |= set(inspect.signature(RecoverableModule).parameters)
        for base in found.__mro__:
            known |= set(inspect.signature(base).parameters) if part == "data" and base is not object else set()
        assert set(recipe[part]["init_args"]) <= known
    settings = recipe["model"]["init_args"]
    AdapterSettings(**settings.get("adapter", {}))
    DistillSettings(**settings.get("distill", {}))
