"""The libraries that only a part of sparsefit needs, and the extra of the package by which each comes."""

from __future__ import annotations

from importlib.util import find_spec

from sparsefit.errors import ConfigError

EXTRAS = {
    "PIL": "images",
    "kornia": "images",
    "sklearn": "images",
    "matplotlib": "figures",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "lm_eval": "tasks",
    "gguf": "gguf",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "bitsandbytes": "quantized",
}
"""By the name under which a library is imported."""
_TITLES = {"PIL": "Pillow", "sklearn": "scikit-learn", "lm_eval": "lm-eval"}


def has(library: str) -> bool:
    """Whether a library is installed; it is not imported."""
    return find_spec(library) is not None


def missing(library: str) -> str:
    """What to say where a library is not there.

    >>> missing("sklearn")
    "scikit-learn, which is not installed: pip install 'sparsefit[images]'"
    """
    return f"{_TITLES.get(library, library)}, which is not installed: pip install 'sparsefit[{EXTRAS[library]}]'"


def need(library: str, purpose: str) -> None:
    """See that a library is installed.

    Args:
        library: One of `EXTRAS`.
        purpose: What needs it, for the message.

    Raises:
        ConfigError: where it is not; names the extra that brings it.
    """
    if not has(library):
        raise ConfigError(f"{purpose} needs {missing(library)}")
