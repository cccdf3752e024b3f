"""Where identities are kept, and how private files are written."""

from __future__ import annotations

import os
from pathlib import Path

from tpirt.errors import IdentityError
from tpirt.files import replace_file

VARIABLE = "TPIRT_IDENTITY"


def config_folder(given: str | Path | None = None) -> Path:
    """The folder of this user's identities: ``given``, or where the environment says.

    Raises:
        IdentityError: there is no home directory, and the environment names no folder.
    """
    if chosen := given or os.environ.get(VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
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
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise IdentityError(f"{path}: cannot be read: {exc.strerror}") from exc
