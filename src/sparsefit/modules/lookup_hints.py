"""Help for names that cannot be found: why the hub cannot be used, and the existing path closest to a wrong one."""

from __future__ import annotations

import difflib
from pathlib import Path

_PROBE_SECONDS = 5.0


def hub_problem() -> str | None:
    """Why the Hugging Face hub cannot be used now, or None if it can. Takes at most about 5 seconds.

    The hub's own client retries for 25 to 50 seconds before it gives up, which looks like a hang.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception as error:  # the HTTP library, and so its error classes, differ between versions of the hub client
        return f"{constants.ENDPOINT} cannot be reached: {error or type(error).__name__}"
    return None


def nearest_path(path: Path) -> str:
    """' Did you mean …?' with the existing path closest in spelling to `path`, or the empty string."""
    parent = path.parent
    if not parent.is_dir():
        return nearest_path(parent) if parent != path else ""
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    return f" Did you mean {parent / close[0]}?" if close else ""
