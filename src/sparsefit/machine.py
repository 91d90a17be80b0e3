"""The machine and the software of a run: versions, devices, the memory of the machine and of this process."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = "sparsefit torch lightning transformers peft datasets tokenizers torchmetrics safetensors accelerate"
_PACKAGES += " bitsandbytes torchvision timm lm_eval numpy"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run may use; missing packages are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES.split():
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """The machine: platform, CPU (model, logical count, count this process may use), memory in bytes, devices.

    This initializes CUDA, so call it in the training process, and not before processes fork.
    """
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": host_memory(),
        "devices": _device_names(),
    }


def peak_memory() -> tuple[int, str]:
    """The peak memory of this process in bytes, and which kind of memory it is.

    If CUDA is in use, it is the memory that torch allocated on the fullest device.
    """
    torch = sys.modules.get("torch")  # a process that never imported torch holds no device memory
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
        if peak:
            return peak, "device memory"
    return _process_peak(), "process memory (CPU)"


def memory_of(accelerator: str) -> int:
    """Bytes of memory of the device that a Trainer's accelerator selects."""
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return host_memory()


def memory_held() -> float:
    """Bytes that this process holds now, of the kind that `peak_memory` counts."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.memory_allocated())
    return process_memory()


def process_memory() -> float:
    """Bytes of host memory that this process holds now."""
    return float(psutil.Process().memory_info().rss)


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return psutil.virtual_memory().total


def free_host_memory() -> int:
    """Bytes of memory of this machine that are free or can be freed."""
    return psutil.virtual_memory().available


def reset_peak_memory() -> None:
    """Reset the peak that `peak_memory` returns; for process memory this works only on Linux."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _process_peak() -> int:
    with suppress(OSError, StopIteration, ValueError, IndexError):
        # Linux: a process that was just started has its parent's peak in getrusage, but not here.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes
    return psutil.Process().memory_info().peak_wset  # Windows


def _cpu_model() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        named = (
            value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"
        )
        if name := next(filter(None, named), ""):
            return name
    return platform.processor() or platform.machine()


def _device_names() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ["MPS"] if torch.backends.mps.is_available() else []
