"""The examples in docstrings run and say what they claim; every public function of the engine has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import sparsefit
import sparsefit.callbacks

PACKAGES = (sparsefit, sparsefit.callbacks)  # callbacks/ may lie outside the folder of sparsefit
MODULES = sorted({f.name for p in PACKAGES for f in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")})
ENGINE = ("sparsefit.pruning.", "sparsefit.bare_model", "sparsefit.quantized")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsefit", *(name for name in MODULES if not name.endswith("__main__"))])
def test_examples_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(ENGINE)])
def test_public_functions_have_an_example(name):
    module = importlib.import_module(name)
    public = [
        function
        for own, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == name and not own.startswith("_")
    ]
    assert [function.__name__ for function in public if ">>>" not in (inspect.getdoc(function) or "")] == []
