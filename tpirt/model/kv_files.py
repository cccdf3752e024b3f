"""Keys and values on disk: sequences of one session that memory is too short for.

A file has one sequence: for each layer the used positions of every head, as they are in memory,
and a checksum of them. Files are in a folder of the session's own in ``<store>/kv``, which goes
with the session. If its process is killed, the next session in that store removes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

from tpirt.errors import StoreError
from tpirt.model.kv_store import Cached
from tpirt.ops.buffers import tensor_bytes
from tpirt.weights.store import Partial, SliceStore, remove_leftovers

_FOLDER = "kv"


class KVFiles:
    """The sequences that a session has on disk, each under a handle.

    All methods block: call them in a thread, one at a time.

    Args:
        store: whose folder, disk and limit are used.
    """

    def __init__(self, store: SliceStore):
        self._store = store
        self._root = store.root / _FOLDER
        self._folder: Partial | None = None  # made for the first sequence
        self._tokens: dict[int, int] = {}
        remove_leftovers(self._root)

    def tokens(self, handle: int) -> int:
        """Number of positions of a sequence.

        Raises:
            StoreError: there is none under this handle.
        """
        if handle not in self._tokens:
            raise StoreError(f"{self._root}: nothing is stored under handle {handle:x}")
        return self._tokens[handle]

    def write(self, handle: int, layers: Sequence[Cached]) -> None:
        """Write a sequence, layer by layer, from where it is in memory.

        Raises:
            StoreError: the disk, or the store's limit, has no room; nothing is kept.
        """
        with self._refused("written"):
            nbytes = sum(len(rows) for layer in layers for rows in _rows(layer))
            promise = self._store.promise(nbytes)
            try:
                self._write(self._created() / _name(handle), layers)
            finally:
                promise.release()
        self._tokens[handle] = layers[0].length

    def read(self, handle: int, layers: Sequence[Cached]) -> None:
        """Read a sequence into memory, which is overwritten in any case.

        Raises:
            StoreError: the file is missing or short, or its bytes have changed.
        """
        with self._refused("read"), open(self._path(handle), "rb") as file:
            for layer in layers:
                checksum = xxhash.xxh3_128()
                for rows in _rows(layer):
                    file.readinto(rows)  # a short file has no checksum either
                    checksum.update(rows)
                if file.read(checksum.digest_size) != checksum.digest():
                    raise StoreError(f"{file.name}: its bytes have changed since they were written")

    def drop(self, handles: Iterable[int]) -> None:
        """Delete sequences; those that are not there are passed over."""
        for handle in self._tokens.keys() & set(handles):
            del self._tokens[handle]
            if self._folder is not None:
                with contextlib.suppress(OSError):
                    (self._folder.path / _name(handle)).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete all sequences."""
        self._tokens.clear()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _created(self) -> Path:
        if self._folder is not None and not self._folder.path.is_dir():
            self._remove_folder()  # somebody deleted it; what was in it is computed again
        if self._folder is None:
            self._root.mkdir(mode=0o700, exist_ok=True)
            self._folder = Partial.create(self._root, "session")
        return self._folder.path

    def _path(self, handle: int) -> Path:
        self.tokens(handle)
        return self._created() / _name(handle)

    def _write(self, path: Path, layers: Sequence[Cached]) -> None:
        partial = path.with_suffix(".partial")
        try:
            with open(partial, "xb", opener=_private) as file:
                for layer in layers:
                    checksum = xxhash.xxh3_128()
                    for rows in _rows(layer):
                        file.write(rows)
                        checksum.update(rows)
                    file.write(checksum.digest())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _refused(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StoreError(f"{self._root}: keys and values cannot be {done}: {exc}") from exc


def _name(handle: int) -> str:
    return f"{handle:016x}"


def _rows(layer: Cached) -> Iterator[memoryview]:
    """The bytes of a layer's positions: of each head, they are contiguous."""
    for tensor in layer.tensors:
        yield from map(tensor_bytes, tensor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
