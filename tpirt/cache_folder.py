"""The folder of what this machine keeps between runs: slices, and hashes of checkpoints."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from tpirt.errors import StoreError
from tpirt.files import can_be_made

_ADVICE = "give --store DIR, or set XDG_CACHE_HOME"


def cache_folder() -> Path:
    """:func:`lasting_cache`, else a folder of this user among the temporary files.

    Raises:
        StoreError: there is none of these.
    """
    return lasting_cache() or temporary_folder()


def lasting_cache() -> Path | None:
    """``$XDG_CACHE_HOME/tpirt``, by default ``~/.cache/tpirt``.

    None without a home directory that can be written to (containers, system users).
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # others are to be ignored
        return given / "tpirt"
    home = os.path.expanduser("~")  # unlike pathlib, it does not fail without one
    folder = Path(home) / ".cache" / "tpirt"
    return folder if folder.is_absolute() and (folder.is_dir() or can_be_made(folder)) else None


def temporary_folder() -> Path:
    """Create a folder that no other user can write to; slices of strangers are not trusted."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    try:
        path = Path(tempfile.gettempdir()) / f"tpirt-{user}"
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as exc:
        raise StoreError(f"no home directory, and no temporary one ({exc}); {_ADVICE}") from exc
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise StoreError(f"no home directory, and {path} is not this user's own; {_ADVICE}")
    return path
