"""Checks that the libraries of export formats are installed; nothing else needs them."""

from __future__ import annotations

from sparsefit import extras

LIBRARIES = {
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
"""The libraries of each format."""


def missing_for(kind: str) -> str:
    """The name of a missing library of a format, and how to install it; empty if none is missing."""
    return next((extras.missing(library) for library in LIBRARIES[kind] if not extras.has(library)), "")


def check_libraries(kind: str) -> None:
    """Check that the libraries of a format are installed.

    Raises:
        ConfigError: if one is missing; names it and the extra that installs it.
    """
    for library in LIBRARIES[kind]:
        extras.need(library, f"the format {kind}")
