"""What is whole of slices that were not finished, for the next writer to take over.

The folder of a slice that is being written has a record: a line with the slice's spec, and one more
for each block file that is on disk. Where its writer ends early, because the sender or the process
is lost, the folder becomes ``.unfinished-*``. Its blocks are as good as those of slices: units are
found by their digests, and files are compared with their checksums when they are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tpirt.errors import StoreError
from tpirt.weights.manifest import BlockFile, Manifest, SliceSpec, parse_fields

PREFIX = ".unfinished-"
_RECORD = "record.jsonl"
_MOST = 4  # folders; older ones are removed
_KEPT_S = 7 * 86_400.0


def record_block(folder: Path, spec: SliceSpec, block: BlockFile) -> None:
    """Record that a block's file is on disk, all of ``spec`` in their order.

    Raises:
        OSError: the record cannot be written.
    """
    lines: list[dict[str, object]] = []
    if not (folder / _RECORD).exists():
        lines.append(spec.fields())
    lines.append({"digests": block.digests.hex(), "xxh3_128": block.xxh3_128})
    with open(folder / _RECORD, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def end_record(folder: Path) -> None:
    """Remove the record: what is in the folder is a slice, or of no use."""
    with contextlib.suppress(OSError):
        (folder / _RECORD).unlink()


def set_aside(folder: Path) -> bool:
    """Keep a folder whose writer has ended, if a block of it is whole; tells whether."""
    manifest = _read(folder)
    if manifest is None or not manifest.blocks:
        return False
    try:
        os.rename(folder, folder.with_name(PREFIX + folder.name.lstrip(".").partition("-")[2]))
    except OSError:
        return False
    _remove_old(folder.parent)
    return True


def unfinished(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Folders and what is whole in them: the first blocks of their specs."""
    for folder in sorted(root.glob(f"{PREFIX}*")):
        manifest = _read(folder)
        if manifest is not None:
            yield folder, manifest


def remove_unfinished(root: Path, key: str) -> None:
    """Remove what was to become the slice with this key: there is one."""
    for folder in root.glob(f"{PREFIX}{key}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path) -> Manifest | None:
    """What a folder's record says; a last line that was cut does not count."""
    try:
        text = (folder / _RECORD).read_text(encoding="utf-8")
        first, *lines = text.split("\n")[:-1]
        spec = SliceSpec.from_fields(parse_fields(first))
        blocks = []
        for block, line in zip(spec.blocks, lines, strict=False):
            fields = parse_fields(line)
            digests, checksum = bytes.fromhex(fields["digests"]), str(fields["xxh3_128"])
            blocks.append(BlockFile.of(block, digests, checksum))
    except (OSError, StoreError, ValueError, KeyError, TypeError):
        return None
    return Manifest(spec, tuple(blocks))


def _remove_old(root: Path) -> None:
    since_s = time.time() - _KEPT_S
    found = []
    for folder in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found.append(((folder / _RECORD).stat().st_mtime, folder))
    found.sort(reverse=True)
    for number, (changed_s, folder) in enumerate(found):
        if number >= _MOST or changed_s < since_s:
            shutil.rmtree(folder, ignore_errors=True)
