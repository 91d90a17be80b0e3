"""Who may import whom: the layers of the package, read from its source."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "transformers",
    "datasets",
    "lightning",
    "peft",
    "bitsandbytes",
    "matplotlib",
    "torchmetrics",
    "pyarrow",
    "rich",
    "kornia",
    "sklearn",
    "PIL",
    "triton",
    "lm_eval",
    "gguf",
    "onnx",
    "onnxruntime",
    "openvino",
)

# Beside the standard library, what all share (COMMON) and itself, a package may import these and no others. Whoever may
# import a package may import the packages in it.
COMMON = {"sparsefit.errors", "sparsefit.files", "sparsefit.settings", "sparsefit.ranks", "sparsefit.sharded"} | {
    "sparsefit.extras",
    "sparsefit.quantized",
    "sparsefit.bare_model",
}
ALLOWED = {
    "errors": set(),
    "files": {"filelock", "safetensors"},
    "settings": set(),
    "extras": set(),
    "ranks": {"torch"},
    "sharded": {"torch"},
    "quantized": {"torch", "bitsandbytes"},
    "bare_model": {"torch"},
    "machine": {"torch", "psutil"},
    "calibration": {"torch"},
    "pruning": {"torch", "numpy", "safetensors", "triton"} | {"sparsefit.calibration", "sparsefit.pruning.layers"},
    "pruning.layers": {"torch"},
    "recovery": {"torch", "safetensors", "transformers", "peft", "bitsandbytes"}
    | {"sparsefit.calibration", "sparsefit.pruning"},
    "evaluation": {"torch", "transformers", "datasets", "torchmetrics", "lightning", "lm_eval"},
    "modules": {"torch", "transformers", "datasets", "torchmetrics", "lightning", "huggingface_hub", "bitsandbytes"}
    | {"safetensors", "sparsefit.calibration", "sparsefit.evaluation", "sparsefit.recovery", "sparsefit.pruning"},
    "data": {"torch", "transformers", "datasets", "torchmetrics", "lightning", "huggingface_hub"}
    | {"pyarrow", "fsspec", "numpy", "PIL", "sklearn", "sparsefit.modules"},
    "reporting": {"rich", "jinja2", "matplotlib", "numpy", "huggingface_hub"},
    "saved_models": {"sparsefit.recovery"},
    "hub": {"huggingface_hub"} | {f"sparsefit.{part}" for part in ("modules", "recovery", "reporting", "saved_models")},
    "planning": {"sparsefit.reporting"},
    "serving": {"torch", "numpy", "transformers", "gguf", "onnxruntime", "openvino", "onnx_ir"}
    | {"sparsefit.pruning", "sparsefit.recovery"},
    "study": {"torch", "sparsefit.calibration", "sparsefit.pruning", "sparsefit.reporting"},
    "callbacks": {
        "torch",
        "numpy",
        "lightning",
        "safetensors",
        "yaml",
        "sparsefit.machine",
        "sparsefit.calibration",
        "sparsefit.pruning",
        "sparsefit.recovery",
        "sparsefit.evaluation",
        "sparsefit.reporting",
        "sparsefit.planning",
    },
}


def sources() -> dict[str, Path]:
    """Every module of the package and its file."""
    folders = {"sparsefit": ROOT / "src/sparsefit", "sparsefit.callbacks": ROOT / "callbacks"}
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for package, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
    }


SOURCES = sources()


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports anywhere in it, each name as deep as it is a module."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in names}
    return frozenset(found - {"__future__"})


def layer(name: str) -> str:
    """The unit that the rules speak of: `torch`, or `sparsefit.pruning` and the like."""
    parts = name.split(".")
    if parts[0] != "sparsefit":
        return parts[0]
    inner = ".".join(parts[:3])
    return inner if inner.removeprefix("sparsefit.") in ALLOWED else ".".join(parts[:2])


def outer(name: str) -> str:
    """The top-level package of a name."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_what_its_layer_may(package):
    own = f"sparsefit.{package}"
    modules = [name for name in SOURCES if layer(name) == own]
    assert modules
    for module in modules:
        used = {layer(name) for name in imports(module)} - {own, *COMMON} - sys.stdlib_module_names
        refused = {name for name in used if not {name, outer(name)} & ALLOWED[package]}
        assert not refused, f"{module} may not import {', '.join(sorted(refused))}"


def test_every_package_has_a_rule():
    packages = {layer(name).partition(".")[2] for name in SOURCES} - {"", "cli", "__main__"}
    assert packages == set(ALLOWED)


def test_every_package_is_installed():
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert set(ast.literal_eval(listed[1])) == {name for name, path in SOURCES.items() if path.name == "__init__.py"}


def test_only_the_command_line_uses_callbacks_and_nothing_imports_it():
    for module in SOURCES:
        used = {layer(name) for name in imports(module)}
        if layer(module) not in ("sparsefit", "sparsefit.callbacks", "sparsefit.cli"):  # the first only hands them on
            assert "sparsefit.callbacks" not in used, module
        if layer(module) != "sparsefit.cli" and module != "sparsefit.__main__":
            assert "sparsefit.cli" not in used, module


def test_no_module_imports_itself_in_a_circle():
    graph = {module: {name for name in imports(module) if name in SOURCES and name != module} for module in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.slow
def test_the_engine_alone_is_light():
    code = f"import sparsefit, sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.slow
def test_a_script_next_to_a_checkout_of_the_same_name_imports_the_package(tmp_path):
    (tmp_path / "sparsefit").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "mine.py").write_text(
        "import sparsefit, sparsefit.pruning.masks\n"
        "from importlib.resources import files\n"
        "print(sparsefit.__version__, (files('sparsefit') / 'assets').is_dir(), sparsefit.prune.__name__)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(tmp_path / "mine.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.stdout.split()[1:] == ["True", "prune"], run.stderr
