"""Optional libraries, and the extra of the package that installs each."""

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
"""Import name of a library -> extra that installs it."""
_TITLES = {"PIL": "Pillow", "sklearn": "scikit-learn", "lm_eval": "lm-eval"}


def has(library: str) -> bool:
    """Whether a library is installed, without importing it."""
    return find_spec(library) is not None


def missing(library: str) -> str:
    """The end of an error message about a missing library: its name and how to install it.

    >>> missing("sklearn")
    "scikit-learn, which is not installed: pip install 'sparsefit[images]'"
    """
    return f"{_TITLES.get(library, library)}, which is not installed: pip install 'sparsefit[{EXTRAS[library]}]'"


def need(library: str, purpose: str) -> None:
    """Check that a library is installed.

    Args:
        library: One of `EXTRAS`.
        purpose: What needs it, for the message.

    Raises:
        ConfigError: if it is not; names the extra that installs it.
    """
    if not has(library):
        raise ConfigError(f"{purpose} needs {missing(library)}")
