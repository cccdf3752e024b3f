"""Write a slice: block files assembled from stored and received units.

One block is in memory at a time, with unpacked 4-bit codes: about the memory for streaming it.
No slice is visible before :meth:`SliceWriter.commit`; blocks of one that ends early are taken over
by the next one (:mod:`tpirt.weights.unfinished`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
import xxhash

from tpirt.errors import StoreError
from tpirt.files import sync_file, sync_folder
from tpirt.locks import lock
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.sharding.units import Unit
from tpirt.weights.layout import block_header, file_bytes
from tpirt.weights.manifest import (
    MANIFEST,
    NO_DIGEST,
    BlockFile,
    Manifest,
    SliceSpec,
    unit_digest,
)
from tpirt.weights.store import (
    Partial,
    SliceStore,
    StoredSlice,
    UnitPlace,
)
from tpirt.weights.unfinished import end_record, record_block, remove_unfinished
from tpirt.weights.unit_bytes import BlockUnits


@dataclass
class _Incoming:
    """The unit that is being received: its number, and its content so far."""

    number: int
    content: bytearray = field(default_factory=bytearray)


@dataclass
class _OpenBlock:
    """The block that is being assembled."""

    content: torch.Tensor  # the whole file
    units: BlockUnits
    digests: list[bytes]  # of its units; NO_DIGEST for missing ones


class SliceWriter:
    """Writes one slice block by block; a context manager. Ends with :meth:`commit`.

    Units of a block can be written in any order. All methods block: call them in a thread, one at
    a time.

    Args:
        store: the store.
        spec: of the slice.
        kept: digests by unit of those that are taken from the store's slices; NO_DIGEST for those
            that will be written.

    Raises:
        StoreError: a kept unit is not in the store; the folder cannot be written; the disk, or
            the store's limit, leaves too little room.
    """

    def __init__(self, store: SliceStore, spec: SliceSpec, kept: Sequence[bytes] = ()):
        self.spec = spec
        self._root = store.root
        self._index = store.index(spec)
        self._starts = _starts(spec)
        self._kept = list(kept) or [NO_DIGEST] * len(spec.places)
        self._sources = self._find_kept()
        self._files = self._find_files()
        self._new_bytes = self._count_new_bytes()
        self._done: list[BlockFile] = []
        self._open: _OpenBlock | None = None
        self._incoming: _Incoming | None = None
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._held = stack.enter_context(ExitStack())  # sources: nobody removes them
                for source in self._sources_in_use():
                    self._held.callback(source.hold().release)
                self._promise = store.promise(self._new_bytes, of_slice=True)
                stack.callback(self._promise.release)
                self._partial = Partial.create(self._root, spec.key)
                stack.callback(self._partial.remove)
                self._stack = stack.pop_all()
        except OSError as exc:
            raise _write_error(self._root, exc) from exc

    def __enter__(self) -> SliceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End; of a slice that was not committed whole blocks are kept. Idempotent."""
        self._stack.close()

    @property
    def new_bytes(self) -> int:
        """Disk space that the slice adds: blocks that another slice has are links to its files."""
        return self._new_bytes

    @property
    def lacking(self) -> list[int]:
        """Numbers of the units that must be written."""
        return [number for number, digest in enumerate(self._kept) if digest == NO_DIGEST]

    def write(self, number: int, offset: int, data: bytes | memoryview) -> None:
        """Append ``data``, canonical bytes of unit ``number`` from ``offset`` on.

        Raises:
            StoreError: out of order, not a lacking unit, beyond its size, or the disk refused.
        """
        if self._incoming is None:
            self._incoming = _Incoming(number)
        expected = self._incoming.number, len(self._incoming.content)
        if (number, offset) != expected or not self._is_due(number):
            if not self._incoming.content:
                self._incoming = None
            raise StoreError(f"slice data out of order: unit {number} at {offset} is not due")
        size = self.spec.unit_bytes(number)
        if offset + len(data) > size:
            raise StoreError(f"{self.spec.places[number][1].key}: more than {size} bytes came")
        self._incoming.content += data
        if len(self._incoming.content) == size:
            content, self._incoming = self._incoming.content, None
            self.put(number, memoryview(content))

    def put(self, number: int, content: memoryview) -> None:
        """Write a whole unit, one of :attr:`lacking`.

        Raises:
            StoreError: units of an earlier block are missing, or the disk refused.
        """
        index, unit = self.spec.places[number]
        block = self._begin(index)
        block.units.put(unit, content)
        block.digests[number - self._starts[index]] = unit_digest(content)

    def put_block(self, index: int, content: torch.Tensor) -> None:
        """Write a whole block file without kept units; uint8 (file_bytes,).

        Raises:
            StoreError: units of an earlier block are missing, or the disk refused.
        """
        self._finish_before(index)
        block = self.spec.blocks[index]
        units = BlockUnits(block, content[len(content) - block.nbytes :])
        digests = [unit_digest(units.get(unit)) for unit in self.spec.units[index]]
        self._save(index, content, digests)

    def commit(self) -> StoredSlice:
        """Flush the slice to disk, then make it visible.

        Raises:
            StoreError: units are missing, or the disk refused.
        """
        self._finish_before(len(self.spec.blocks))
        self._held.close()  # one of them may be the damaged slice that this one mends
        manifest = Manifest(self.spec, tuple(self._done))
        target = self._root / manifest.slice_id
        try:
            with open(self._partial.path / MANIFEST, "w", encoding="utf-8") as file:
                file.write(manifest.to_json())
                file.flush()
                sync_file(file.fileno())
            sync_folder(self._partial.path)
            end_record(self._partial.path)
            if target.exists():
                self._mend(target)
            else:
                os.rename(self._partial.path, target)
            sync_folder(self._root)
        except OSError as exc:
            raise self._refused(exc) from exc
        self._stack.close()
        remove_unfinished(self._root, self.spec.key)
        return StoredSlice(target, manifest)

    def _mend(self, target: Path) -> None:
        """Replace the files of an existing slice with the same content, because it may be damaged.

        Does nothing if a session uses it.
        """
        if not target.is_dir():
            target.unlink()
            target.mkdir()
        held = lock(target / MANIFEST)
        if held is None:
            return
        held.release()
        for name in [block.file for block in self._done] + [MANIFEST]:
            if (target / name).is_dir():
                shutil.rmtree(target / name)
            os.replace(self._partial.path / name, target / name)

    # -- stored units --------------------------------------------------------------------------

    def _find_kept(self) -> dict[int, UnitPlace]:
        sources = {}
        for number, digest in enumerate(self._kept):
            if digest == NO_DIGEST:
                continue
            key = self.spec.places[number][1].key
            place = self._index.find(key, digest)
            if place is None:
                raise StoreError(
                    f"{self._root}: {key} was removed while the slice was written; start again"
                )
            sources[number] = place
        return sources

    def _sources_in_use(self) -> list[StoredSlice]:
        found = [place.stored for place in self._sources.values()]
        found += [stored for stored, _ in self._files.values()]
        return list({stored.path: stored for stored in found}.values())

    def _kept_of(self, index: int) -> list[bytes]:
        start = self._starts[index]
        return self._kept[start : start + len(self.spec.units[index])]

    def _find_files(self) -> dict[int, tuple[StoredSlice, int]]:
        """Block files in the store with the content of this slice's blocks, by block."""
        files = {}
        for index, block in enumerate(self.spec.blocks):
            kept = self._kept_of(index)
            if NO_DIGEST not in kept:
                content = BlockFile.of(block, b"".join(kept)).content
                if (found := self._index.file(content)) is not None:
                    files[index] = found
        return files

    def _count_new_bytes(self) -> int:
        """Size of the files that cannot be links."""
        blocks = enumerate(self.spec.blocks)
        return sum(file_bytes(block) for index, block in blocks if index not in self._files)

    # -- blocks --------------------------------------------------------------------------------

    def _is_due(self, number: int) -> bool:
        if not 0 <= number < len(self._kept) or self._kept[number] != NO_DIGEST:
            return False
        index = self.spec.places[number][0]
        current = len(self._done)
        if index != current or self._open is None:
            return index >= current
        return self._open.digests[number - self._starts[index]] == NO_DIGEST

    def _begin(self, index: int) -> _OpenBlock:
        self._finish_before(index)
        if self._open is None:
            block = self.spec.blocks[index]
            header = block_header(block)
            content = _buffer(len(header) + block.nbytes, self._root)
            tensor_bytes(content)[: len(header)] = header
            units = BlockUnits(block, content[len(header) :])
            self._open = _OpenBlock(content, units, self._kept_of(index))
        return self._open

    def _finish_before(self, index: int) -> None:
        """Complete the blocks before ``index`` from written and stored units."""
        while len(self._done) < index:
            current = len(self._done)
            if current in self._files:
                self._link(current, *self._files[current])
                continue
            self._finish(current, self._begin(current))
        if len(self._done) > index:
            raise StoreError(f"slice data out of order: block {index} is written already")

    def _finish(self, index: int, block: _OpenBlock) -> None:
        if NO_DIGEST in block.digests:
            missing = self.spec.units[index][block.digests.index(NO_DIGEST)].key
            raise StoreError(f"the slice ends early: {missing} is missing")
        wanted: dict[Unit, UnitPlace] = {}
        for position, unit in enumerate(self.spec.units[index]):
            if (place := self._sources.get(self._starts[index] + position)) is not None:
                wanted[unit] = place
        for unit, content in self._index.read(wanted):
            block.units.put(unit, content)
        block.units.flush()
        self._open = None
        self._save(index, block.content, block.digests)

    def _save(self, index: int, content: torch.Tensor, digests: Sequence[bytes]) -> None:
        data = tensor_bytes(content)
        checksum = xxhash.xxh3_128_hexdigest(data)
        entry = BlockFile.of(self.spec.blocks[index], b"".join(digests), checksum)
        try:
            with open(self._partial.path / entry.file, "wb", buffering=0) as file:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
                sync_file(file.fileno())
            self._promise.keep(len(data))
        except OSError as exc:
            raise self._refused(exc) from exc
        self._record(entry)

    def _link(self, index: int, stored: StoredSlice, theirs: int) -> None:
        """Link a file of another slice; copy it if the disk has no hard links."""
        stored.read_block(theirs)  # a damaged file must not spread
        found = stored.manifest.blocks[theirs]
        entry = BlockFile.of(self.spec.blocks[index], found.digests, found.xxh3_128)
        source, target = stored.block_path(theirs), self._partial.path / entry.file
        try:
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
                with open(target, "rb") as file:
                    sync_file(file.fileno())
        except OSError as exc:
            raise self._refused(exc) from exc
        self._record(entry)

    def _record(self, entry: BlockFile) -> None:
        try:
            record_block(self._partial.path, self.spec, entry)
        except OSError as exc:
            raise self._refused(exc) from exc
        self._done.append(entry)

    def _refused(self, exc: OSError) -> StoreError:
        """The disk refused: what was written would only take its room."""
        end_record(self._partial.path)
        return _write_error(self._root, exc)


def _starts(spec: SliceSpec) -> list[int]:
    """The number of each block's first unit."""
    starts, start = [], 0
    for units in spec.units:
        starts.append(start)
        start += len(units)
    return starts


def _buffer(nbytes: int, root: Path) -> torch.Tensor:
    try:
        return page_buffer(nbytes)
    except (OSError, MemoryError) as exc:
        raise StoreError(f"{root}: no memory for a block of {nbytes:,} bytes") from exc


def _write_error(root: Path, exc: OSError) -> StoreError:
    return StoreError(f"{root}: cannot write the slice: {exc.strerror}; nothing of it was kept")
