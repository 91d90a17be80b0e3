"""What only a part of sparsefit needs: the extra that brings it is named, and the rest does without."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from sparsefit.cli.input_errors import sentence
from sparsefit.data import DigitsDataModule, ImageDataModule
from sparsefit.errors import ConfigError
from sparsefit.extras import EXTRAS
from sparsefit.modules.loading import load_image_processor
from sparsefit.reporting.pages import render_html

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.figures

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "lm_eval": "lm-eval"}


def extras():
    """The extras of the package and their requirements, as text."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return dict(re.findall(r"^(\w+) = (\[.*?\])$", section, re.M | re.S)), text.split(
        "[project.optional-dependencies]"
    )[0]


def test_each_library_is_in_the_extra_that_messages_name_and_in_no_other_place():
    named, core = extras()
    for library, extra in EXTRAS.items():
        package = PACKAGES.get(library, library)
        assert package in named[extra]
        assert f'"{package}' not in core
    # Each extra is one that some code needs, several of them together, or for those who work on the package.
    assert set(named) == {*EXTRAS.values(), "export", "docs", "dev"}


@pytest.mark.parametrize(
    ("library", "use"),
    [
        ("PIL", lambda: ImageDataModule(train_source="digits:train", image_size=16, mean=[0.3], std=[0.4])),
        ("PIL", lambda: load_image_processor("somewhere")),
        ("sklearn", lambda: DigitsDataModule().setup("fit")),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, library, use):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=re.escape(f"pip install 'sparsefit[{EXTRAS[library]}]'")):
        use()


def test_a_class_of_a_recipe_from_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    reason = "Problem with given class_path 'kornia.augmentation.RandomCrop':\n  No module named 'kornia'"
    reported = sentence(f'Parser key "data.augmentation":\n  {reason}')
    assert reported.startswith("data.augmentation: kornia.augmentation.RandomCrop needs kornia")
    assert reported.endswith("pip install 'sparsefit[images]'")


def test_without_matplotlib_a_page_has_no_figures_and_says_so(monkeypatch):
    report = {"name": "a run", "metrics": {"perplexity": "lower"}, "perplexity": {"dense": 2.0}}
    report["timeline"] = [{"stage": "dense", "gpu_hours": 0.1, "step": 0, "metric": "perplexity", "value": 2.0}]
    assert "<svg" in (page := render_html(report))
    assert "sparsefit[figures]" not in page
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "<svg" not in (page := render_html(report))
    assert "sparsefit[figures]" in page


def test_no_module_imports_one_when_it_is_imported():
    """But the one of bitsandbytes' layers, which is imported where a base is quantized."""
    folders = (ROOT / "src/sparsefit", ROOT / "callbacks")
    found = set()
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {(file.name, name) for name in names if name.partition(".")[0] in EXTRAS}
    assert found == {("quantized_linear.py", "bitsandbytes")}
