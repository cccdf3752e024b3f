"""Where identities are kept, and how private files are written."""

from __future__ import annotations

import contextlib
import logging
import os
from functools import cache
from pathlib import Path
from shlex import quote

from tpirt.errors import IdentityError
from tpirt.files import read_regular, replace_file

VARIABLE = "TPIRT_IDENTITY"

_MOST_BYTES = 1 << 20
_log = logging.getLogger("tpirt.cluster")


def config_folder(given: str | Path | None = None) -> Path:
    """The folder of this user's identities: ``given``, or where the environment says.

    Raises:
        IdentityError: there is no home directory, and the environment names no folder.
    """
    if chosen := given or os.environ.get(VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):  # to be ignored
        base = os.path.expanduser("~/.config")
    if not os.path.isabs(base):
        raise IdentityError(
            "no home directory to keep keys in; give --identity DIR, or set "
            f"{VARIABLE} or XDG_CONFIG_HOME to a folder that only you can read"
        )
    return Path(base) / "tpirt"


def write_private(path: Path, data: bytes) -> None:
    """Replace a file by one that only this user can read, at once or not at all.

    Raises:
        IdentityError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        replace_file(path, data, 0o600)
    except OSError as exc:
        raise IdentityError(f"{path}: cannot be written: {exc.strerror}") from exc


def read(path: Path) -> bytes | None:
    """Read a file of at most 1 MiB; None if there is none.

    Raises:
        IdentityError: it cannot be read.
    """
    try:
        return read_regular(path, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise IdentityError(f"{path}: cannot be read: {exc.strerror}") from exc


def read_key(path: Path) -> bytes | None:
    """As :func:`read`, of a file with a private key: warns if others can read it as well."""
    with contextlib.suppress(OSError):
        if os.name == "posix" and path.stat().st_mode & 0o077:
            _warn_of_readers(path)
    return read(path)


@cache  # once in a process
def _warn_of_readers(path: Path) -> None:
    command = f"chmod 600 {quote(str(path))}"
    _log.warning(f"{path}: other users can read this private key; run `{command}`")
