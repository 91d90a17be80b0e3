from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch  # noqa: F401 - and torchmetrics, which would not be imported without matplotlib
import pytest
import torch
from tiny_models import make_tiny_model
from torch import nn

os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # before datasets is imported: it calls the hub for local files, too
SHARED_DATA = Path(__file__).parents[1] / "../shared/data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no process runs one alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Exclude the libraries' objects from garbage collection, which otherwise takes a third of a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def figures_where_asked_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports are drawn only in modules marked `figures`: without matplotlib, a report takes 0.2 s less."""
    with pytest.MonkeyPatch.context() as changed:
        if not request.node.get_closest_marker("figures"):
            changed.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and models next to the repository. Tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("there is no folder ../shared/data with real data and models")
    return SHARED_DATA


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """bitsandbytes compiles its fallback for odd widths: seconds for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """Makes a tiny random transformers model: `tiny_model("llama", seed, **changes of its configuration)`."""
    return make_tiny_model
