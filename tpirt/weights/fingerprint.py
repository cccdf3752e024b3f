"""The content hash of a checkpoint, and a cache of it.

Every byte of every tensor is hashed with XXH3, which is faster than disks. The result is cached
with each file's size, inode, mtime and ctime; files are read again only if one of them changes.
Programs cannot set ctime, so an edit that restores mtime is noticed too. After ``touch`` or a copy
the files are hashed again, but slices are still valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from tpirt.cache_folder import cache_folder
from tpirt.errors import StoreError
from tpirt.files import read_regular, write_atomically
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.types import Progress, ProgressCallback
from tpirt.weights.header import TensorInfo

_READ_BYTES = 4 << 20
_READERS = 2

# The hash of a file that changed less than this before is not cached: it may change again within
# one tick of the file system's clock, unnoticed. FAT has ticks of 2 s.
_SETTLED_NS = 3_000_000_000

# Fills a buffer with a tensor's bytes from an offset on.
_Fill = Callable[[TensorInfo, int, memoryview], None]


def content_digest(
    tensors: Iterable[TensorInfo],
    files: Mapping[Path, int],
    fill: _Fill,
    progress: ProgressCallback,
) -> str:
    """Return a digest of all tensors' names, dtypes, shapes and bytes.

    Args:
        tensors: the tensors, in any order.
        files: their files with open descriptors.
        fill: reads tensor bytes; called from several threads.
        progress: called with the bytes hashed, from several threads.

    Raises:
        CheckpointError: ``fill`` failed.
    """
    state = _state(files)
    noted = _note_path(files)
    known = _remembered(noted, state)
    if known is not None:
        return known
    began_ns = time.time_ns()
    digest = hashlib.sha256()
    ordered = sorted(tensors, key=lambda info: info.name)
    hashes = _hash_all(ordered, fill, progress)
    for info in ordered:
        digest.update(
            json.dumps([info.name, str(info.dtype), info.shape, hashes[info.name]]).encode()
        )
    result = digest.hexdigest()
    changed_ns = max(max(entry[2:4]) for entry in state.values()) if state else 0
    if _state(files) == state and changed_ns + _SETTLED_NS < began_ns:
        _remember(noted, state, result)
    return result


def _hash_all(
    tensors: Iterable[TensorInfo], fill: _Fill, progress: ProgressCallback
) -> dict[str, str]:
    in_file_order = sorted(tensors, key=lambda info: (info.path, info.offset))
    total = sum(info.nbytes for info in in_file_order)
    own = threading.local()
    lock = threading.Lock()
    done = 0

    def hash_one(info: TensorInfo) -> str:
        nonlocal done
        if not hasattr(own, "buffer"):
            own.buffer = page_buffer(_READ_BYTES)
        memory, hasher = tensor_bytes(own.buffer), xxhash.xxh3_128()
        for start in range(0, info.nbytes, _READ_BYTES):
            part = memory[: min(_READ_BYTES, info.nbytes - start)]
            fill(info, start, part)
            hasher.update(part)
            with lock:
                done += len(part)
                progress(Progress("checking the model's files", done, total))
        return hasher.hexdigest()

    with ThreadPoolExecutor(_READERS, "tpirt-hash") as pool:
        try:
            hashes = list(pool.map(hash_one, in_file_order))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {info.name: each for info, each in zip(in_file_order, hashes, strict=True)}


def _state(files: Mapping[Path, int]) -> dict[str, list[int]]:
    """Return size, inode and times of change of each file."""
    state = {}
    for path, descriptor in sorted(files.items()):
        found = os.fstat(descriptor)
        state[path.name] = [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    return state


def _note_path(files: Iterable[Path]) -> Path | None:
    """Path of the cached hash of these files; None without a folder for it."""
    try:
        names = "\n".join(str(path.resolve()) for path in sorted(files))
        name = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return cache_folder() / "fingerprints" / f"{name}.json"
    except (OSError, StoreError):
        return None


def _remembered(path: Path | None, state: dict[str, list[int]]) -> str | None:
    try:
        noted = json.loads(read_regular(path)) if path is not None else None
        if noted is None or noted["files"] != state:
            return None
        digest = noted["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _remember(path: Path | None, state: dict[str, list[int]], digest: str) -> None:
    """Cache the hash atomically; if that fails, the files are hashed again next time."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"files": state, "digest": digest}))
