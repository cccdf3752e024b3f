"""The header of a safetensors file: 8 bytes of length, JSON, then data without gaps.

Format: https://huggingface.co/docs/safetensors. The ``safetensors`` package is not used, because
it maps the file: a mapped file that shrinks kills the process.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tpirt.dtypes import SAFETENSORS_DTYPES
from tpirt.errors import CheckpointError
from tpirt.files import open_regular, stand_in

MAX_HEADER_BYTES = 100_000_000
RECOPY = "copy or download the file again"

# Other files that are often found under a weight file's name, by their first bytes.
_OTHER_FILES = {
    b"PK\x03\x04": "a PyTorch .bin file; convert it to safetensors",
    b"GGUF": "a GGUF file; use the original safetensors checkpoint",
}


@dataclass(frozen=True)
class TensorInfo:
    """The position of a tensor: ``nbytes`` bytes at the absolute ``offset`` of file ``path``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def checkpoint_error(
    path: Path, problem: str, *, expected: object = None, got: object = None, advice: str = RECOPY
) -> CheckpointError:
    """Format an error: ``path: problem: expected .., got ..; advice``."""
    difference = "" if expected is None else f": expected {expected}, got {got}"
    return CheckpointError(f"{path}: {problem}{difference}; {advice}")


def read_error(path: Path, subject: str, exc: OSError) -> CheckpointError:
    """Format an operating system's error."""
    denied = isinstance(exc, PermissionError)
    advice = "allow reading it (chmod)" if denied else "check the disk"
    return checkpoint_error(path, f"{subject} cannot be read ({exc.strerror})", advice=advice)


def open_file(path: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises:
        CheckpointError: missing, unreadable, or not a regular file.
    """
    try:
        return open_regular(path)
    except FileNotFoundError as exc:
        raise checkpoint_error(path, "no such file") from exc
    except OSError as exc:
        raise read_error(path, "the file", exc) from exc


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Every tensor's bytes must be within the file and match its shape and dtype, and all tensors
    must fill the data exactly. Takes two reads, without reading tensor data.

    Returns:
        The tensors by name, in the file's order.

    Raises:
        CheckpointError: a missing, unreadable or truncated file, another kind of file (such as a
            git-lfs pointer), or an invalid header.
    """
    fd = open_file(path)
    try:
        return parse_header(fd, path)
    finally:
        os.close(fd)


def parse_header(fd: int, path: Path) -> dict[str, TensorInfo]:
    """Read the header of an open file; see :func:`read_header`."""
    file_bytes = os.fstat(fd).st_size
    header_bytes = _header_bytes(_read(fd, path, 64, 0), path, file_bytes)
    content = _json_object(_read(fd, path, header_bytes, 8), path)
    content.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in content.items()}
    _check_layout(path, list(tensors.values()), data_start, file_bytes)
    return tensors


def _read(fd: int, path: Path, count: int, offset: int) -> bytes:
    try:
        return os.pread(fd, count, offset)
    except OSError as exc:
        raise read_error(path, "the header", exc) from exc


def _header_bytes(head: bytes, path: Path, file_bytes: int) -> int:
    others = (what for magic, what in _OTHER_FILES.items() if head.startswith(magic))
    if other := stand_in(head) or next(others, None):
        raise CheckpointError(f"{path}: this is {other}")
    if len(head) < 8:
        raise checkpoint_error(path, "file too short", expected="8 bytes or more", got=len(head))
    header_bytes = int.from_bytes(head[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise checkpoint_error(
            path,
            "header length (is this a safetensors file?)",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            got=header_bytes,
        )
    if 8 + header_bytes > file_bytes:
        raise checkpoint_error(
            path,
            "truncated within its header",
            expected=f"{8 + header_bytes} bytes or more",
            got=file_bytes,
        )
    return header_bytes


def _json_object(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if name in content:
                raise checkpoint_error(path, f"{name}: listed twice in the header")
            content[name] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:
        raise checkpoint_error(path, f"header is not valid JSON ({exc})") from exc
    if not isinstance(content, dict):
        raise checkpoint_error(path, "header", expected="a JSON object", got=type(content).__name__)
    return content


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise checkpoint_error(path, name, expected="a JSON object", got=repr(entry)[:80])
    dtype = SAFETENSORS_DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise checkpoint_error(
            path,
            f"{name}: dtype",
            expected=f"one of {', '.join(SAFETENSORS_DTYPES)}",
            got=repr(entry.get("dtype"))[:80],
            advice="use a float32, float16 or bfloat16 checkpoint",
        )
    shape = _counts(path, f"{name}: shape", entry.get("shape"))
    offsets = _counts(path, f"{name}: data_offsets", entry.get("data_offsets"))
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise checkpoint_error(
            path, f"{name}: data_offsets", expected="[begin, end]", got=list(offsets)
        )
    nbytes = offsets[1] - offsets[0]
    needed = math.prod(shape) * dtype.itemsize
    if nbytes != needed:
        raise checkpoint_error(
            path,
            f"{name}: size of {entry['dtype']} {shape}",
            expected=f"{needed} bytes",
            got=nbytes,
        )
    return TensorInfo(name, dtype, shape, path, data_start + offsets[0], nbytes)


def _counts(path: Path, subject: str, value: object) -> tuple[int, ...]:
    def is_count(each: object) -> bool:
        return isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**63

    if not isinstance(value, list) or not all(is_count(each) for each in value):
        raise checkpoint_error(
            path, subject, expected="a list of whole numbers", got=repr(value)[:80]
        )
    return tuple(value)


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, file_bytes: int) -> None:
    """Check that the tensors' data is contiguous and fills the file."""
    ordered = sorted(tensors, key=lambda info: (info.offset, info.nbytes))
    end = ordered[-1].offset + ordered[-1].nbytes if ordered else start
    for before, info in pairwise(ordered):
        if info.offset < before.offset + before.nbytes:
            raise checkpoint_error(path, f"{info.name}: its data overlaps that of {before.name}")
        if info.offset > before.offset + before.nbytes:
            raise checkpoint_error(path, f"{info.name}: a hole in the data before it")
    if ordered and ordered[0].offset != start:
        raise checkpoint_error(path, f"{ordered[0].name}: a hole in the data before it")
    if end > file_bytes:
        name = next(info.name for info in ordered if info.offset + info.nbytes > file_bytes)
        raise checkpoint_error(
            path, f"{name}: file is truncated", expected=f"{end} bytes", got=file_bytes
        )
    if end < file_bytes:
        raise checkpoint_error(
            path, "file is longer than its header says", expected=f"{end} bytes", got=file_bytes
        )
