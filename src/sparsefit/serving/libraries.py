"""The libraries that write and run other formats: none is needed for anything else, so each is asked for when used."""

from __future__ import annotations

from importlib.util import find_spec

from sparsefit.errors import ConfigError

LIBRARIES = {
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
"""What each format needs."""


def missing_for(kind: str) -> str:
    """Why a format cannot be written or run here; the empty string if it can.

    >>> missing_for("gguf") in ("", "gguf is not installed: pip install 'sparsefit[gguf]'")
    True
    """
    missing = [name for name in LIBRARIES[kind] if find_spec(name) is None]
    if not missing:
        return ""
    verb = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {verb} not installed: pip install 'sparsefit[{kind}]'"


def check_libraries(kind: str) -> None:
    """See that the libraries of a format are there.

    Raises:
        ConfigError: naming those that are not, and the extra that brings them.
    """
    if why := missing_for(kind):
        raise ConfigError(f"the format {kind} cannot be written here: {why}")
