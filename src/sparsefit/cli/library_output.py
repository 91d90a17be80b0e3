"""Silences irrelevant output of libraries, and simplifies how they report write errors and interrupts."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsefit.errors import SparsefitError
from sparsefit.files import unwritable

# Libraries' messages about one another, and about validation data that a recipe leaves out on purpose.
_IRRELEVANT = ("`isinstance\\(treespec, LeafSpec\\)`", "`is_gradient_checkpointing`", "Total length of `list`")


def silence_libraries() -> None:
    """Silence messages that do not concern the command, and progress bars if the output is not a terminal."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    for message in _IRRELEVANT:
        warnings.filterwarnings("ignore", message=message)
    # peft imports bitsandbytes, which recommends a faster 4-bit kernel even if nothing is quantized.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bar()
        disable_progress_bars()


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


@contextmanager
def clear_write_errors() -> Iterator[None]:
    """Turn write errors of any library, such as a full disk, into one sentence."""
    try:
        yield
    except SparsefitError:
        raise
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in _UNWRITABLE or isinstance(error, SafetensorError):
            raise unwritable(Path(getattr(error, "filename", None) or "a file of the run"), error) from error
        raise


@contextmanager
def interrupts() -> Iterator[None]:
    """Keep Ctrl-C a KeyboardInterrupt; Lightning would exit."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
