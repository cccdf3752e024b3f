"""Where the chat keeps its own files: in the user's state folder, which only the user can read."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path | None:
    """``$XDG_STATE_HOME/tpirt`` or its default, ``~/.local/state/tpirt``; None without a home."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    state = given if given.is_absolute() else Path(os.path.expanduser("~/.local/state"))
    return state / "tpirt" if state.is_absolute() else None
