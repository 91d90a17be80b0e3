"""Parsing slices of a source: `SOURCE[start:stop]`."""

from __future__ import annotations

import re

from sparsefit.errors import ConfigError

_SLICE = re.compile(r"\[(\d*):(\d*)\]$")
_LIKE_A_SLICE = re.compile(r"\[[^\[\]]*:[^\[\]]*\]$")


def split_slice(source: str, what: str) -> tuple[str, int, int | None]:
    """Split a source into its name, start and stop (None: to the end); `what` is the word for an item in errors.

    Raises:
        ConfigError: for a source without a name, an empty slice, or an invalid one.
    """
    match = _SLICE.search(source)
    if not source[: match.start() if match else None].strip():  # as a path it would be the current folder
        raise ConfigError(f"{source!r} names no source of {what}s: give a file, a folder or a data set")
    if match is None:
        if _LIKE_A_SLICE.search(source):
            raise ConfigError(
                f"{source!r} ends in no slice that a source takes: SOURCE[start:stop] has whole numbers from 0 on, "
                f"counts each {what} from the start, and may leave one of them out ([100:], [:100])"
            )
        return source, 0, None
    start, stop = match.groups()
    if stop and int(stop) <= int(start or 0):
        raise ConfigError(f"{source!r} takes no {what}: its slice ends before it starts")
    return source[: match.start()], int(start or 0), int(stop) if stop else None
