"""What writes and runs the formats of other programs: libraries that nothing else needs."""

from __future__ import annotations

from sparsefit import extras

LIBRARIES = {
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
"""By format."""


def missing_for(kind: str) -> str:
    """Which library a format lacks here, and how to have it; the empty string if none."""
    return next((extras.missing(library) for library in LIBRARIES[kind] if not extras.has(library)), "")


def check_libraries(kind: str) -> None:
    """See that the libraries of a format are there.

    Raises:
        ConfigError: naming one that is not, and the extra that brings it.
    """
    for library in LIBRARIES[kind]:
        extras.need(library, f"the format {kind}")
