"""Where models and texts are looked for: whether the hub can be used, and the path that a wrong one may have meant."""

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
    except Exception as error:  # the client's library, and so its errors' classes, differ between versions of the hub
        return f"{constants.ENDPOINT} cannot be reached: {error or type(error).__name__}"
    return None


def nearest_path(path: Path) -> str:
    """' Did you mean …?' with the existing neighbour spelled most like `path`, or the empty string."""
    parent = path.parent
    if not parent.is_dir():
        return nearest_path(parent) if parent != path else ""
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    return f" Did you mean {parent / close[0]}?" if close else ""
