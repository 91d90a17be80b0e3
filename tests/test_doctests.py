"""The examples in the engine's docstrings run and say what they claim; every public function has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import sparsefit.pruning

MODULES = [
    *sorted(found.name for found in pkgutil.walk_packages(sparsefit.pruning.__path__, "sparsefit.pruning.")),
    "sparsefit.bare_model",
    "sparsefit.quantized",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_have_an_example(name):
    module = importlib.import_module(name)
    public = [
        function
        for own, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == name and not own.startswith("_")
    ]
    assert [function.__name__ for function in public if ">>>" not in (inspect.getdoc(function) or "")] == []
