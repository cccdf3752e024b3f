"""The slice store: a folder with one folder per slice, a manifest and its block files in each.

Slices are immutable: a slice's id covers its content, and its folder is renamed into place after
everything is on disk, so a crash leaves a whole slice or none. Blocks that two slices share are
hard links to one file. For another plan, a slice is assembled from units of the slices in the
store; only missing units come from elsewhere.

The folder ``known`` has the digests of units that this machine cut as a master. Reports of workers
are compared with them. See docs/store.md.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from tpirt.cache_folder import cache_folder, lasting_cache
from tpirt.errors import DamagedSliceError, StoreError
from tpirt.files import nearest, read_regular, write_atomically
from tpirt.locks import Lock, lock, try_lock
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.sharding.units import Unit
from tpirt.types import Progress, ProgressCallback, ignore_progress
from tpirt.units import format_bytes
from tpirt.weights.layout import file_bytes
from tpirt.weights.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    NO_DIGEST,
    BlockFile,
    Manifest,
    SliceSpec,
    parse_fields,
    unit_digest,
)
from tpirt.weights.reader import buffer_bytes, read_file
from tpirt.weights.room import Promise, Room
from tpirt.weights.unfinished import RECORD, set_aside, tidy_unfinished, unfinished
from tpirt.weights.unit_bytes import BlockUnits

_PARTIAL, _LOCK = ".partial-", ".lock-"
_KNOWN = "known"
_MOST_SLICES = 1024
_RESTS_S = 600.0  # since its last use, after which a slice may go: others are being loaded, perhaps
_log = logging.getLogger(__name__)
_SLICE_ID = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True)
class StoredSlice:
    """A slice on disk, or the whole blocks of an unfinished one.

    Attributes:
        path: its folder.
        manifest: of what is whole.
        record: the file in its folder that says so; readers of the slice lock it.
    """

    path: Path
    manifest: Manifest
    record: str = MANIFEST

    def block_path(self, index: int) -> Path:
        """The file of the block with this index."""
        return self.path / self.manifest.blocks[index].file

    def check(self, index: int, content: memoryview) -> None:
        """Compare a block file's content with the manifest's checksum, at memory speed.

        A slice that has changed loses its manifest, so that nothing finds it any more.

        Raises:
            DamagedSliceError: it has changed since it was written.
        """
        expected, got = self.manifest.blocks[index].xxh3_128, xxhash.xxh3_128_hexdigest(content)
        if got != expected:
            with contextlib.suppress(OSError):
                (self.path / self.record).unlink()
            raise DamagedSliceError(
                f"{self.block_path(index)}: expected checksum {expected}, got {got}: its bytes "
                f"have changed since they were written; {self.path} will be recreated"
            )

    def hold(self) -> Lock:
        """Lock the slice against removal, and record that it is used.

        Raises:
            StoreError: it is being removed now.
        """
        held = lock(self.path / self.record, shared=True)
        if held is None:
            raise StoreError(f"{self.path}: is being removed; start again")
        with contextlib.suppress(OSError):  # not ours, or read-only
            os.utime(self.path / self.record)
        return held

    @property
    def used_s(self) -> float:
        """When it was used last, in seconds since the epoch."""
        try:
            return (self.path / self.record).stat().st_mtime
        except OSError:
            return 0.0

    def read_block(self, index: int) -> torch.Tensor:
        """Read and check one block file; uint8 (nbytes,), page-aligned.

        Raises:
            StoreError: it is missing, cannot be read, or has changed since it was written.
        """
        block = self.manifest.blocks[index]
        _check_size(self.path, block)
        buffer = page_buffer(buffer_bytes(block.nbytes))
        read_file(self.block_path(index), tensor_bytes(buffer), block.nbytes)
        self.check(index, tensor_bytes(buffer)[: block.nbytes])
        return buffer[: block.nbytes]

    def units(self, index: int, units: Sequence[Unit]) -> Iterator[tuple[Unit, memoryview]]:
        """Read units of one block.

        Raises:
            StoreError: the file cannot be read, or has changed since it was written.
        """
        block, content = self.manifest.spec.blocks[index], self.read_block(index)
        view = BlockUnits(block, content[len(content) - block.nbytes :])
        for unit in units:
            yield unit, view.get(unit)

    def verify(self, progress: ProgressCallback = ignore_progress) -> None:
        """Read every block file and compare its checksum with the manifest's.

        Raises:
            StoreError: a file is missing, cannot be read, or has changed since it was written.
        """
        done = 0
        for index, block in enumerate(self.manifest.blocks):
            self.read_block(index)
            done += block.nbytes
            progress(Progress("verifying", done, self.manifest.nbytes))


@dataclass(frozen=True)
class UnusableSlice:
    """A slice that cannot be used as it is.

    ``outdated`` if it has an older format; otherwise it has a newer one, is damaged, or unfinished.
    ``fields`` are those of its manifest.
    """

    path: Path
    slice_id: str
    model: str
    reason: str
    outdated: bool
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    record: str = MANIFEST

    def is_remade_as(self, spec: SliceSpec) -> bool:
        """Whether a slice of ``spec`` takes its place."""
        wanted = json.loads(json.dumps(spec.fields()))
        same = all(self.fields.get(name) == wanted[name] for name in ("model", "dtype", "shard"))
        scheme = str(self.fields.get("quantize")).partition(":")[0]  # older formats: int4:64
        return self.outdated and same and scheme == wanted["quantize"].partition(":")[0]


@dataclass(frozen=True)
class UnitPlace:
    """The place of a unit: a block of a slice, and the unit in that block."""

    stored: StoredSlice
    block: int
    unit: Unit
    digest: bytes


class UnitIndex:
    """The places of all units of one model in one format in a store."""

    def __init__(self, slices: Sequence[StoredSlice], space: str):
        self._places: dict[str, list[UnitPlace]] = {}
        self._files: dict[str, tuple[StoredSlice, int]] = {}
        for stored in slices:
            if stored.manifest.spec.space == space:
                self._add(stored)

    def find(self, key: str, digest: bytes = NO_DIGEST) -> UnitPlace | None:
        """Find a unit by key, and by content if a digest is given."""
        for place in self._places.get(key, ()):
            if digest in (NO_DIGEST, place.digest):
                return place
        return None

    def file(self, content: str) -> tuple[StoredSlice, int] | None:
        """Find a block file by content; returns its slice and index."""
        return self._files.get(content)

    def digest(self, key: str, known: bytes) -> bytes:
        """The digest of a unit, if possible the known one; NO_DIGEST if the unit is missing."""
        place = self.find(key, known) or self.find(key)
        return NO_DIGEST if place is None else place.digest

    def read(self, wanted: Mapping[Unit, UnitPlace]) -> Iterator[tuple[Unit, memoryview]]:
        """Read units, each block file once, and compare their digests.

        Args:
            wanted: units in the caller's block, and their places.

        Raises:
            StoreError: a file cannot be read, or has changed since it was written.
        """
        by_file: dict[tuple[Path, int], list[tuple[Unit, UnitPlace]]] = {}
        for unit, place in wanted.items():
            by_file.setdefault((place.stored.path, place.block), []).append((unit, place))
        for (_, index), entries in by_file.items():
            stored = entries[0][1].stored
            read = stored.units(index, [place.unit for _, place in entries])
            for (unit, place), (_, content) in zip(entries, read, strict=True):
                if unit_digest(content) != place.digest:
                    raise StoreError(
                        f"{stored.block_path(index)}: {unit.key} is not what its manifest says; "
                        f"delete {stored.path}; it will be recreated"
                    )
                yield unit, content

    def _add(self, stored: StoredSlice) -> None:
        units = stored.manifest.spec.units
        digests = iter(stored.manifest.digests)
        for index, block in enumerate(stored.manifest.blocks):
            theirs = [(unit, next(digests)) for unit in units[index]]
            with contextlib.suppress(StoreError):  # skip damaged files
                _check_size(stored.path, block)
                self._files.setdefault(block.content, (stored, index))
                for unit, digest in theirs:
                    place = UnitPlace(stored, index, unit, digest)
                    self._places.setdefault(unit.key, []).append(place)


def store_folder() -> Path:
    """The folder ``slices`` of :func:`cache_folder`.

    Raises:
        StoreError: there is no folder for it.
    """
    return cache_folder() / "slices"


def default_store() -> Path:
    """:func:`store_folder`, to be used; warns of a temporary one."""
    folder = store_folder()
    if lasting_cache() is None:
        _log.warning(
            "no home directory that can be written to: slices are kept in %s; give --store DIR to "
            "keep them elsewhere",
            folder,
        )
    return folder


class SliceStore:
    """Finds slices under one folder; :class:`tpirt.weights.writer.SliceWriter` writes them.

    Args:
        root: the folder; may be missing.
        limit_bytes: maximum size; None for no limit except the disk.

    Raises:
        StoreError: a file is where a folder is expected.
    """

    def __init__(self, root: Path, limit_bytes: int | None = None):
        there = nearest(root)
        if not there.is_dir():
            found = "links to nowhere" if there.is_symlink() else "is a file"
            raise StoreError(f"{root}: expected a folder, but {there} {found}; give another one")
        self.root = root
        self.limit_bytes = limit_bytes
        self._room = Room(root, limit_bytes, self.bytes_used)

    def find(self, slice_id: str) -> StoredSlice | None:
        """Find a slice by id, in the store's folder and its subfolders.

        Also in the folders ``rank0``, ``rank1`` ... of ``tpirt split``. Checks presence and size
        of the files.

        Raises:
            StoreError: the slice is there but damaged: its manifest broken, or a file of it
                missing or of a wrong size.
        """
        if not _SLICE_ID.fullmatch(slice_id):
            raise StoreError(f"slice id {slice_id[:40]!r}: expected 24 hexadecimal digits")
        own = self.root / slice_id
        for folder in (own, self.root, *self._folders()):
            try:
                manifest = _read_manifest(folder)
            except StoreError:
                if folder == own:
                    raise
                continue
            if manifest is not None and manifest.slice_id == slice_id:
                for block in manifest.blocks:
                    _check_size(folder, block)
                return StoredSlice(folder, manifest)
        return None

    def slices(self) -> list[StoredSlice]:
        """All slices in the store's folder and its subfolders."""
        found = []
        for folder in (self.root, *self._folders()):
            with contextlib.suppress(StoreError):
                manifest = _read_manifest(folder)
                if manifest is not None:
                    found.append(StoredSlice(folder, manifest))
        return found

    def unusable(self) -> list[UnusableSlice]:
        """Slices with another format version, damaged and unfinished ones."""
        found = []
        for folder in self._folders():
            try:
                manifest, reason = _read_manifest(folder), "damaged: its manifest is missing"
            except StoreError as exc:
                manifest, reason = None, str(exc)
            if manifest is None and (entry := _unusable(folder, reason)) is not None:
                found.append(entry)
        return found + [_as_unusable(*each) for each in unfinished(self.root)]

    def matching(self, ids: Sequence[str]) -> list[StoredSlice | UnusableSlice]:
        """The slices whose ids begin with one of ``ids``; all slices if ``ids`` is empty.

        Raises:
            StoreError: no slice has such an id.
        """
        named: list[tuple[str, StoredSlice | UnusableSlice]] = [
            *((stored.manifest.slice_id, stored) for stored in self.slices()),
            *((each.slice_id, each) for each in self.unusable()),
        ]
        for wanted in ids:
            if not any(slice_id.startswith(wanted) for slice_id, _ in named):
                raise StoreError(f"{self.root}: no slice {wanted!r}; `tpirt store ls` lists them")
        return [each for slice_id, each in named if not ids or slice_id.startswith(tuple(ids))]

    def remove(self, stored: StoredSlice | UnusableSlice) -> None:
        """Remove a slice, its manifest first: the rest is then not taken for a slice.

        Raises:
            StoreError: a session uses it; the folder cannot be changed.
        """
        held = lock(stored.path / stored.record)
        if held is None:
            raise StoreError(f"{stored.path}: a running session uses it; end that first")
        try:
            (stored.path / stored.record).unlink(missing_ok=isinstance(stored, UnusableSlice))
            if stored.path != self.root:
                shutil.rmtree(stored.path)
            elif isinstance(stored, StoredSlice):
                for block in stored.manifest.blocks:
                    (stored.path / block.file).unlink(missing_ok=True)
        except OSError as exc:
            raise StoreError(f"{stored.path}: cannot be removed: {exc.strerror}") from exc
        finally:
            held.release()

    def growth(self, spec: SliceSpec, new_bytes: int) -> str:
        """Describe what a new slice adds, and other slices of the model, which it differs from."""
        others = [each.manifest for each in self.slices() if _same_model(each.manifest, spec)]
        limit = "" if self.limit_bytes is None else f" of at most {format_bytes(self.limit_bytes)}"
        total = format_bytes(self.bytes_used() + new_bytes)
        text = (
            f"new slice of {spec.model} ({spec.label}): adds {format_bytes(new_bytes)} to "
            f"{self.root}, which then has {total}{limit}"
        )
        if others:
            there = ", ".join(f"{each.slice_id} ({each.spec.label})" for each in others[:2])
            more = f" and {len(others) - 2} more" if len(others) > 2 else ""
            text += f"; other slices of this model there: {there}{more}"
        return text

    def index(self, spec: SliceSpec) -> UnitIndex:
        """Index the units that ``spec`` can consist of, also those of unfinished slices."""
        begun = [StoredSlice(*each, RECORD) for each in remove_leftovers(self.root)]
        return UnitIndex([*self.slices(), *begun], spec.space)

    def inventory(self, spec: SliceSpec, known: Sequence[bytes] = ()) -> list[bytes]:
        """Return the digests of a slice's units in the store; NO_DIGEST for missing ones.

        Args:
            spec: of the slice.
            known: wanted digests, as far as known; preferred if there are several contents for
                one key.
        """
        index = self.index(spec)
        wanted = known or [NO_DIGEST] * len(spec.places)
        return [
            index.digest(unit.key, digest)
            for (_, unit), digest in zip(spec.places, wanted, strict=True)
        ]

    # -- known digests -----------------------------------------------------------------------

    def known(self, spec: SliceSpec) -> list[bytes]:
        """The digests of a slice's units as cut by this machine; NO_DIGEST for unknown ones."""
        for folder in self._known_folders():
            with contextlib.suppress(StoreError):
                manifest = _read_manifest(folder, f"{spec.key}.json")
                if manifest is not None and manifest.spec.key == spec.key:
                    return manifest.digests
        known: dict[str, bytes] = {}
        for folder in self._known_folders():
            for path in sorted(folder.glob("*.json")):
                with contextlib.suppress(StoreError):
                    manifest = _read_manifest(folder, path.name)
                    if manifest is not None and manifest.spec.space == spec.space:
                        keys = (unit.key for _, unit in manifest.spec.places)
                        known.update(zip(keys, manifest.digests, strict=True))
        return [known.get(unit.key, NO_DIGEST) for _, unit in spec.places]

    def remember(self, manifest: Manifest) -> None:
        """Keep a slice's digests for :meth:`known`; if that fails, it is cut again next time."""
        folder = self.root / _KNOWN
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"{manifest.spec.key}.json", manifest.to_json())

    def promise(self, nbytes: int, *, of_slice: bool = False) -> Promise:
        """Reserve room for a writer.

        Args:
            nbytes: size of what will be written.
            of_slice: for which, with a limit, slices go that were not used for longest.

        Raises:
            StoreError: not enough room, or too many slices.
            OSError: the folder cannot be read.
        """
        count = len(self._folders())
        if count >= _MOST_SLICES:  # every lookup reads all of them
            raise StoreError(
                f"{self.root}: has {count} slices already; remove some with `tpirt store rm`"
            )
        return self._room.promise(nbytes, self._evict if of_slice else lambda _: None)

    def _evict(self, nbytes: int) -> None:
        """Remove what nobody uses until ``nbytes`` are free: first what cannot be used as it is."""
        left, now_s = nbytes, time.time()
        found: list[tuple[StoredSlice | UnusableSlice, str]] = [
            (each, f"{each.model}, {each.reason}") for each in self.unusable()
        ]
        for stored in sorted(self.slices(), key=lambda stored: stored.used_s):
            if now_s - _RESTS_S < stored.used_s <= now_s:  # later: by a clock that was wrong
                continue
            since = time.strftime("%Y-%m-%d", time.localtime(stored.used_s))
            found.append((stored, f"{stored.manifest.model}, last used on {since}"))
        for each, about in found:
            if left <= 0:
                return
            freed = _own_bytes(each)
            with contextlib.suppress(StoreError):  # in use
                self.remove(each)
                left -= freed
                limit = format_bytes(self.limit_bytes or 0)
                _log.info("removed %s (%s): the store's limit is %s", each.path, about, limit)

    def check_room(self, spec: SliceSpec, held: Sequence[bytes]) -> None:
        """Check that the blocks of a slice's missing units would fit, before any of them comes.

        Args:
            spec: of the slice.
            held: by unit, the digest of what is here; NO_DIGEST where nothing is.

        Raises:
            StoreError: not enough room, or too many slices.
        """
        missing = {spec.places[n][0] for n, digest in enumerate(held) if digest == NO_DIGEST}
        if not missing:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            needed = sum(file_bytes(spec.blocks[block]) for block in missing)
            self._room.check(needed)
        except OSError as exc:
            raise StoreError(f"{self.root}: cannot be written: {exc.strerror}") from exc

    def own_bytes(self, slices: Sequence[StoredSlice]) -> dict[Path, int]:
        """Return the bytes that removing each slice would free, by folder."""
        return {stored.path: _own_bytes(stored) for stored in slices}

    def bytes_used(self) -> int:
        """Size of all files in the folder; files with several links count once."""
        sizes: dict[tuple[int, int], int] = {}
        for folder, _, files in os.walk(self.root):
            for name in files:
                with contextlib.suppress(OSError):
                    found = os.lstat(os.path.join(folder, name))
                    sizes[found.st_dev, found.st_ino] = found.st_size
        return sum(sizes.values())

    def _known_folders(self) -> list[Path]:
        return [self.root / _KNOWN, *sorted(self.root.glob(f"rank*/{_KNOWN}"))]

    def _folders(self) -> list[Path]:
        try:
            folders = sorted(p for p in self.root.iterdir() if not p.name.startswith("."))
            return folders + sorted(self.root.glob("rank*/[!.]*"))
        except OSError:
            return []


@dataclass(frozen=True)
class Partial:
    """A slice that is being written: a folder, and a locked file next to it until it ends.

    A file, because network file systems do not lock folders across hosts.
    """

    path: Path
    lock: Lock

    @classmethod
    def create(cls, root: Path, name: str) -> Partial:
        """Create an empty folder.

        Raises:
            OSError: it cannot be created.
        """
        while True:
            unique = f"{name}-{secrets.token_hex(4)}"
            path, file = root / f"{_PARTIAL}{unique}", root / f"{_LOCK}{unique}"
            file.touch(exist_ok=False)
            held = lock(file)
            if held is None:
                continue
            try:
                if file.exists():  # not removed as a leftover
                    path.mkdir()
                    return cls(path, held)
            except BaseException:
                file.unlink(missing_ok=True)
                held.release()
                raise
            held.release()

    def remove(self) -> None:
        """Remove it, if it was not renamed into place, but what is whole of it; idempotent."""
        _remove_partial(self.path)
        self.lock.release()


def remove_leftovers(root: Path) -> list[tuple[Path, Manifest]]:
    """Remove partial slices of writers that have ended, on any host, but what is whole of them.

    Returns the folders that are kept, and what is whole in them. A folder without a lock is a
    leftover, too: locks are made before and removed after.
    """
    for file in root.glob(f"{_LOCK}*"):
        held = try_lock(file)
        if held is not None:
            _remove_partial(root / file.name.replace(_LOCK, _PARTIAL, 1))
            held.release()
    for folder in root.glob(f"{_PARTIAL}*"):
        if not _lock_of(folder).exists():
            _remove_partial(folder)
    return tidy_unfinished(root)


def _remove_partial(path: Path) -> None:
    if not set_aside(path):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        _lock_of(path).unlink()


def _lock_of(partial: Path) -> Path:
    return partial.with_name(partial.name.replace(_PARTIAL, _LOCK, 1))


def _own_bytes(each: StoredSlice | UnusableSlice) -> int:
    """Bytes that removing a slice frees: of files without a link in another one."""
    if isinstance(each, StoredSlice):
        files = [each.path / block.file for block in each.manifest.blocks]
    else:
        files = [path for path in each.path.rglob("*") if path.is_file()]
    total = 0
    for path in files:
        with contextlib.suppress(OSError):
            found = path.stat()
            total += found.st_size if found.st_nlink == 1 else 0
    return total


def _same_model(manifest: Manifest, spec: SliceSpec) -> bool:
    return manifest.fingerprint == spec.fingerprint and manifest.spec.key != spec.key


def _read_manifest(folder: Path, name: str = MANIFEST) -> Manifest | None:
    try:
        return Manifest.from_json(read_regular(folder / name))
    except OSError:
        return None
    except StoreError as exc:
        raise StoreError(
            f"{folder / name}: {exc}; delete the folder; it will be recreated"
        ) from exc


def _unusable(folder: Path, reason: str) -> UnusableSlice | None:
    """Recognise a slice of any format version."""
    try:
        fields = parse_fields(read_regular(folder / MANIFEST))
    except (OSError, StoreError):
        fields = {}
    if not _SLICE_ID.fullmatch(folder.name) and "format_version" not in fields:
        return None  # not a slice
    version = fields.get("format_version")
    outdated = isinstance(version, int) and version < FORMAT_VERSION
    if outdated:
        reason = "written by an older tpirt"
    slice_id = str(fields.get("slice_id", folder.name))
    model = str(fields.get("model", ""))
    return UnusableSlice(folder, slice_id, model, reason, outdated, fields)


def _as_unusable(folder: Path, begun: Manifest) -> UnusableSlice:
    done, total, size = len(begun.blocks), len(begun.spec.blocks), format_bytes(begun.nbytes)
    reason = f"unfinished: {done} of {total} blocks, {size}, for the next start"
    return UnusableSlice(folder, begun.spec.key, begun.model, reason, outdated=False, record=RECORD)


def _check_size(folder: Path, block: BlockFile) -> None:
    path = folder / block.file
    try:
        size = path.stat().st_size
    except OSError as exc:
        raise StoreError(f"{path}: {exc.strerror}; delete {folder}; it will be recreated") from exc
    if size != block.nbytes:
        raise StoreError(
            f"{path}: expected {block.nbytes} bytes, got {size}; delete {folder}; "
            "it will be recreated"
        )
