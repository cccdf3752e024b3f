"""The slice store: a folder with one folder per slice, a manifest and its block files in each.

A slice is written beside its final place and renamed when it is whole and on disk; a crash at any
moment leaves the old store or the new one. Its id says which bytes it holds, so it is found again
whatever the plan that asks for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import psutil
import xxhash

from tpirt.errors import StoreError
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.sharding.blocks import Block
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Shard, Span
from tpirt.types import Progress, ProgressCallback, ignore_progress
from tpirt.weights.layout import file_bytes
from tpirt.weights.reader import buffer_bytes, read_file

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PIECE_BYTES = 4 << 20  # of a stored file, handed on at once

# A part of a slice: index of the block, offset in the block's file, bytes.
SlicePiece = tuple[int, int, memoryview]

_PARTIAL = ".partial-"
_SLICE_ID = re.compile(r"[0-9a-f]{24}")
_BLOCK_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}", re.IGNORECASE)


@dataclass(frozen=True)
class BlockFile:
    """One block file of a slice; ``xxh3_128`` of its bytes is empty until it was written."""

    name: str
    nbytes: int
    xxh3_128: str = ""

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a slice holds, and in which form; see :class:`tpirt.sharding.format.WeightFormat`."""

    slice_id: str
    fingerprint: str
    model: str
    dtype: str
    quantize: str
    layout: str
    shard: Shard
    blocks: tuple[BlockFile, ...]

    @classmethod
    def plan(
        cls,
        fingerprint: str,
        model: str,
        form: WeightFormat,
        shard: Shard,
        blocks: Iterable[Block],
    ) -> Manifest:
        """Describe a slice that is yet to be written."""
        files = tuple(BlockFile(block.name, file_bytes(block)) for block in blocks)
        identity = json.dumps([FORMAT_VERSION, fingerprint, form.names, asdict(shard)])
        slice_id = hashlib.sha256(identity.encode()).hexdigest()[:24]
        return cls(slice_id, fingerprint, model, *form.names, shard, files)

    @property
    def form(self) -> WeightFormat:
        """The form of the weights.

        Raises:
            ConfigError: one that this version does not know.
        """
        return WeightFormat.named(self.dtype, self.quantize, self.layout)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def to_json(self) -> str:
        """Serialise; :meth:`from_json` gives an equal manifest back."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse a manifest.

        Raises:
            StoreError: not a manifest, one of another format version, or one whose names lead
                outside its folder.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise StoreError(
                    f"slice manifest of format {version}, this tpirt reads {FORMAT_VERSION}"
                )
            shard = dict(fields.pop("shard"))
            first = bool(shard.pop("first"))
            spans = {name: Span(*map(int, span)) for name, span in shard.items()}
            blocks = tuple(BlockFile(**block) for block in fields.pop("blocks"))
            manifest = cls(shard=Shard(**spans, first=first), blocks=blocks, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise StoreError(f"not a slice manifest: {exc}") from exc
        _check_names(manifest)
        return manifest


@dataclass(frozen=True)
class StoredSlice:
    """A whole slice on disk."""

    path: Path
    manifest: Manifest

    def block_path(self, index: int) -> Path:
        """The file of the block with this index."""
        return self.path / self.manifest.blocks[index].file

    def check(self, index: int, content: memoryview) -> None:
        """Compare a block file's content with the manifest's checksum, at memory speed.

        Raises:
            StoreError: it is not what was written; names the file.
        """
        expected, got = self.manifest.blocks[index].xxh3_128, xxhash.xxh3_128_hexdigest(content)
        if got != expected:
            raise StoreError(
                f"{self.block_path(index)}: expected checksum {expected}, got {got}: its bytes "
                f"have changed since they were written; remove {self.path}, and have it made anew"
            )

    def pieces(self) -> Generator[SlicePiece]:
        """Yield the bytes of all block files in order, past the file cache, 4 MiB at a time.

        A piece is valid until the next one is asked for. A file's checksum is compared with the
        manifest's before its first piece.

        Raises:
            StoreError: a file is missing, cannot be read, or is not what was written; names it.
        """
        largest = max(block.nbytes for block in self.manifest.blocks)
        buffer = tensor_bytes(page_buffer(buffer_bytes(largest)))
        for index, block in enumerate(self.manifest.blocks):
            _check_size(self.path, block)
            read_file(self.block_path(index), buffer[: buffer_bytes(block.nbytes)], block.nbytes)
            content = buffer[: block.nbytes]
            self.check(index, content)
            for offset in range(0, block.nbytes, PIECE_BYTES):
                yield index, offset, content[offset : offset + PIECE_BYTES]

    def verify(self, progress: ProgressCallback = ignore_progress) -> None:
        """Read every block file and compare its checksum with the manifest's.

        Raises:
            StoreError: a file is missing, cannot be read, or is not what was written; names it.
        """
        done = 0
        for _, _, data in self.pieces():
            done += len(data)
            progress(Progress("verifying", done, self.manifest.nbytes))


def default_store() -> Path:
    """``$XDG_CACHE_HOME/tpirt/slices``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpirt" / "slices"


class SliceStore:
    """Finds and writes slices under one folder."""

    def __init__(self, root: Path):
        self.root = root

    def find(self, slice_id: str) -> StoredSlice | None:
        """Look a slice up by id, in the store's folder itself and in the folders within it.

        The folders ``rank0``, ``rank1`` ... that ``tpirt split`` writes are looked into as well.
        Files are checked by presence and size. What is no manifest of ours is passed by, except
        in the slice's own folder.

        Raises:
            StoreError: the slice is there but damaged: its manifest broken, or a file of it
                missing or of a wrong size.
        """
        if not _SLICE_ID.fullmatch(slice_id):
            raise StoreError(f"slice id {slice_id!r}: expected 24 hexadecimal digits")
        own = self.root / slice_id
        for folder in (own, self.root, *self._folders()):
            try:
                manifest = _read_manifest(folder)
            except StoreError:
                if folder == own:
                    raise
                continue
            if manifest is not None and manifest.slice_id == slice_id:
                _check_files(folder, manifest)
                return StoredSlice(folder, manifest)
        return None

    def slices(self) -> list[StoredSlice]:
        """All slices here, in the store's folder itself and in the folders within it."""
        found = []
        for folder in (self.root, *self._folders()):
            with contextlib.suppress(StoreError):
                manifest = _read_manifest(folder)
                if manifest is not None:
                    found.append(StoredSlice(folder, manifest))
        return found

    def matching(self, ids: Sequence[str]) -> list[StoredSlice]:
        """The slices whose ids begin with one of ``ids``; all of them without any.

        Raises:
            StoreError: an id that no slice here has.
        """
        slices = self.slices()
        for wanted in ids:
            if not any(s.manifest.slice_id.startswith(wanted) for s in slices):
                raise StoreError(f"{self.root}: no slice {wanted!r}; `tpirt store ls` lists them")
        return [s for s in slices if not ids or s.manifest.slice_id.startswith(tuple(ids))]

    def remove(self, stored: StoredSlice) -> None:
        """Remove a slice, its manifest first: what is left of it then is no slice.

        Raises:
            StoreError: the folder cannot be changed.
        """
        try:
            (stored.path / MANIFEST).unlink()
            if stored.path == self.root:
                for block in stored.manifest.blocks:
                    (stored.path / block.file).unlink(missing_ok=True)
            else:
                shutil.rmtree(stored.path)
        except OSError as exc:
            raise StoreError(f"{stored.path}: cannot be removed: {exc.strerror}") from exc

    def write(self, manifest: Manifest) -> SliceWriter:
        """Begin a new slice; use as a context manager, then :meth:`SliceWriter.commit`.

        Raises:
            StoreError: the folder cannot be written, or the disk has too little room.
        """
        return SliceWriter(self, manifest)

    def _folders(self) -> list[Path]:
        try:
            folders = sorted(p for p in self.root.iterdir() if not p.name.startswith("."))
            return folders + sorted(self.root.glob("rank*/[!.]*"))
        except OSError:
            return []


class SliceWriter:
    """Writes one slice, block after block; nothing of it is visible before ``commit``."""

    def __init__(self, store: SliceStore, manifest: Manifest):
        self.manifest = manifest
        self._root = store.root
        self._done: list[BlockFile] = []
        self._file: BinaryIO | None = None
        self._digest = xxhash.xxh3_128()
        self._offset = 0
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            _remove_stale(self._root)
            free = shutil.disk_usage(self._root).free
            if free < manifest.nbytes:
                raise StoreError(
                    f"{self._root}: the slice needs {manifest.nbytes:,} bytes, the disk has "
                    f"{free:,} free; make room or choose another --store"
                )
            # A folder of its own: the same slice may be coming from two sides at once.
            prefix, suffix = f"{_PARTIAL}{manifest.slice_id}-", f"-{os.getpid()}"
            self._path = Path(tempfile.mkdtemp(suffix, prefix, self._root))
            self._path.chmod(0o755)
        except OSError as exc:
            raise _write_error(self._root, exc) from exc

    def __enter__(self) -> SliceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
                self._file.close()
        shutil.rmtree(self._path, ignore_errors=True)

    def write(self, block: int, offset: int, data: bytes | memoryview) -> None:
        """Append ``data``, the bytes of block file ``block`` from ``offset`` on.

        Raises:
            StoreError: out of order, beyond the block's size, or the disk refused.
        """
        expected = (len(self._done), self._offset)
        if (block, offset) != expected or block >= len(self.manifest.blocks):
            raise StoreError(f"slice data out of order: expected {expected}, got {block, offset}")
        entry = self.manifest.blocks[block]
        if offset + len(data) > entry.nbytes:
            raise StoreError(f"{entry.name}: more than {entry.nbytes} bytes came")
        try:
            if self._file is None:
                self._file = open(self._path / entry.file, "wb")  # noqa: SIM115
            self._file.write(data)
            self._digest.update(data)
            self._offset += len(data)
            if self._offset == entry.nbytes:
                self._end_block(entry)
        except OSError as exc:
            raise _write_error(self._root, exc) from exc

    def commit(self) -> StoredSlice:
        """Make the slice visible, after everything of it is on disk.

        Raises:
            StoreError: blocks are missing, or the disk refused.
        """
        if len(self._done) != len(self.manifest.blocks):
            missing = self.manifest.blocks[len(self._done)].name
            raise StoreError(f"the slice ends early: {missing} is missing")
        manifest = Manifest(**{**vars(self.manifest), "blocks": tuple(self._done)})
        target = self._root / manifest.slice_id
        aside: Path | None = None
        try:
            with open(self._path / MANIFEST, "w", encoding="utf-8") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(self._path)
            if target.exists():  # damaged, or written by someone else meanwhile
                aside = Path(tempfile.mkdtemp(f"-{os.getpid()}", _PARTIAL, self._root))
                os.rename(target, aside / "old")
            os.rename(self._path, target)
            _sync_folder(self._root)
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
        except OSError as exc:
            raise _write_error(self._root, exc) from exc
        return StoredSlice(target, manifest)

    def _end_block(self, entry: BlockFile) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._done.append(BlockFile(entry.name, entry.nbytes, self._digest.hexdigest()))
        self._file, self._offset, self._digest = None, 0, xxhash.xxh3_128()


def _check_names(manifest: Manifest) -> None:
    """Refuse what would be written outside the slice's folder: a manifest may be a stranger's."""
    if not (isinstance(manifest.slice_id, str) and _SLICE_ID.fullmatch(manifest.slice_id)):
        raise StoreError(f"slice manifest with an id that is none: {manifest.slice_id!r}")
    names = [block.name for block in manifest.blocks]
    for block in manifest.blocks:
        if not (isinstance(block.name, str) and _BLOCK_NAME.fullmatch(block.name)):
            raise StoreError(f"slice manifest names a file outside its folder: {block.name!r}")
        if type(block.nbytes) is not int or block.nbytes <= 0:
            raise StoreError(f"slice manifest: {block.name} of {block.nbytes!r} bytes")
    if not names or len(set(names)) < len(names):
        raise StoreError("slice manifest: expected blocks of different names")


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.from_json((folder / MANIFEST).read_bytes())
    except OSError:
        return None
    except StoreError as exc:
        raise StoreError(
            f"{folder / MANIFEST}: {exc}; remove the folder, it will be made anew"
        ) from exc


def _check_files(folder: Path, manifest: Manifest) -> None:
    for block in manifest.blocks:
        _check_size(folder, block)


def _check_size(folder: Path, block: BlockFile) -> None:
    path = folder / block.file
    try:
        size = path.stat().st_size
    except OSError as exc:
        raise StoreError(f"{path}: {exc.strerror}; remove {folder} and start again") from exc
    if size != block.nbytes:
        raise StoreError(
            f"{path}: expected {block.nbytes} bytes, got {size}; remove {folder} and start again"
        )


def _remove_stale(root: Path) -> None:
    """Remove what writers left that no longer live."""
    for path in root.glob(f"{_PARTIAL}*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(root: Path, exc: OSError) -> StoreError:
    return StoreError(f"{root}: cannot write the slice: {exc.strerror}; nothing of it was kept")
