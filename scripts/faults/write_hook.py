"""Counts the writes of a process in a folder, and acts at one of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "tempfile.mkstemp")


class Writes:
    """A hook for `sys.addaudithook` that counts the writes of a process in a folder, and acts from the n-th write on.

    Args:
        folder: The folder.
        at: The number of the first write at which the hook acts.
        act: Called with the name of the event.
    """

    def __init__(self, folder: Path, at: int, act: Callable[[str], None]) -> None:
        self.folder, self.at, self.act, self.count = str(folder), at, act, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an event of the process, and act if its number is reached."""
        if event not in WRITES or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.count += 1
        if self.count >= self.at:
            self.act(event)
