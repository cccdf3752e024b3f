"""Reading files that may be something else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tpirt.files import free_bytes, read_regular


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"content"
    assert read_regular(tmp_path / "file", 3) == b"con"
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "absent")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: object) -> None:
    make(tmp_path / "other")  # type: ignore[operator]
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(tmp_path / "other")


def test_free_space_of_a_folder_that_is_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_bytes(tmp_path / "not" / "made")
    assert free is not None
    assert 0 <= free <= shutil.disk_usage(tmp_path).total
    (tmp_path / "unmounted").symlink_to("nowhere")
    assert free_bytes(tmp_path / "unmounted") is None
    silent = shutil.disk_usage(tmp_path)._replace(total=0, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: silent)
    assert free_bytes(tmp_path) is None
