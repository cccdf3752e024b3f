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
from tpirt.files import read_regular
from tpirt.locks import lock
from tpirt.weights.manifest import DIGEST_BYTES, BlockFile, Manifest, SliceSpec, parse_fields

PREFIX = ".unfinished-"
RECORD = "record.jsonl"
_MOST = 4  # folders; older ones are removed
_KEPT_S = 7 * 86_400.0
_MOST_BYTES = 256 << 20  # of a record


def record_block(folder: Path, spec: SliceSpec, block: BlockFile) -> None:
    """Record that a block's file is on disk, all of ``spec`` in their order.

    Raises:
        OSError: the record cannot be written.
    """
    lines: list[dict[str, object]] = []
    if not (folder / RECORD).exists():
        lines.append(spec.fields())
    lines.append({"digests": block.digests.hex(), "xxh3_128": block.xxh3_128})
    with open(folder / RECORD, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def end_record(folder: Path) -> None:
    """Remove the record: what is in the folder is a slice, or of no use."""
    with contextlib.suppress(OSError):
        (folder / RECORD).unlink()


def set_aside(folder: Path) -> bool:
    """Keep a folder whose writer has ended, if a block of it is whole; tells whether."""
    manifest = _read(folder)
    if manifest is None or not manifest.blocks:
        return False
    try:
        os.rename(folder, folder.with_name(PREFIX + folder.name.lstrip(".").partition("-")[2]))
    except OSError:
        return False
    return True


def unfinished(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Folders and what is whole in them: the first blocks of their specs."""
    for folder in sorted(root.glob(f"{PREFIX}*")):
        manifest = _read(folder)
        if manifest is not None:
            yield folder, manifest


def tidy_unfinished(root: Path) -> list[tuple[Path, Manifest]]:
    """Remove what is old, and all but the longest of what was to become one slice; tell the rest.

    As :func:`unfinished`, without reading the records again, which can be long.
    """
    found: dict[str, list[tuple[int, float, Path, Manifest]]] = {}
    for folder in root.glob(f"{PREFIX}*"):
        manifest = _read(folder)
        with contextlib.suppress(OSError):
            changed_s = (folder / RECORD).stat().st_mtime
            if manifest is None or changed_s < time.time() - _KEPT_S:
                _remove(folder)
            else:
                entry = (len(manifest.blocks), changed_s, folder, manifest)
                found.setdefault(manifest.spec.key, []).append(entry)
    longest = []
    for entries in found.values():
        *shorter, best = sorted(entries)
        longest.append(best)
        for _, _, folder, _ in shorter:
            _remove(folder)
    longest.sort(key=lambda entry: entry[1], reverse=True)
    for _, _, folder, _ in longest[_MOST:]:
        _remove(folder)
    return [(folder, manifest) for _, _, folder, manifest in longest[:_MOST]]


def remove_unfinished(root: Path, key: str) -> None:
    """Remove what was to become the slice with this key: there is one."""
    for folder in root.glob(f"{PREFIX}{key}-*"):
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, unless a writer reads it."""
    held = lock(folder / RECORD)
    if held is not None:
        shutil.rmtree(folder, ignore_errors=True)
        held.release()


def _read(folder: Path) -> Manifest | None:
    """What a folder's record says, up to a line that was cut or damaged."""
    try:
        text = read_regular(folder / RECORD, _MOST_BYTES).decode(errors="replace")
        first, *lines = text.split("\n")[:-1]
        spec = SliceSpec.from_fields(parse_fields(first))
    except (OSError, StoreError, ValueError):
        return None
    blocks = []
    for block, units, line in zip(spec.blocks, spec.units, lines, strict=False):
        try:
            fields = parse_fields(line)
            digests, checksum = bytes.fromhex(fields["digests"]), str(fields["xxh3_128"])
        except (StoreError, ValueError, KeyError, TypeError):
            break
        if len(digests) != DIGEST_BYTES * len(units):
            break
        blocks.append(BlockFile.of(block, digests, checksum))
    return Manifest(spec, tuple(blocks))
