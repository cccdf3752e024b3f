"""A Hugging Face safetensors checkpoint, read by byte range.

Files are neither mapped nor cached: memory is bounded by the results of calls, and a file that
shrinks or vanishes is an error, not a signal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from tpirt.config import QUANTIZED, ModelConfig
from tpirt.dtypes import CHECKPOINT_DTYPES, dtype_name
from tpirt.errors import CheckpointError
from tpirt.files import read_regular
from tpirt.ops.buffers import tensor_bytes
from tpirt.sharding.blocks import Block
from tpirt.sharding.partition import Shard
from tpirt.types import ProgressCallback, ignore_progress
from tpirt.weights.fingerprint import content_digest
from tpirt.weights.header import (
    TensorInfo,
    checkpoint_error,
    open_file,
    parse_header,
    read_error,
    read_header,
)
from tpirt.weights.names import (
    EMBEDDING,
    LM_HEAD,
    PREFIX,
    expected_tensors,
    head_shape,
    is_model_part,
    name_prefix,
    unprefixed_name,
)
from tpirt.weights.slicer import slice_bytes

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "check_tensors",
    "checkpoint_error",
    "read_header",
    "resolve_tied",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ROWS_BYTES = 1 << 20  # whole rows in memory at once while columns are cut out
# Gaps smaller than this are read, not skipped: a separate cold read takes as long as about 170 KiB
# in sequence (NVMe, 60 us and 2.8 GB/s), and warm ones are no faster.
_SKIP_BYTES = 128 << 10
# What GPTQ, AWQ, compressed-tensors, bitsandbytes and FP8 store beside or instead of a weight.
_QUANTIZED_TENSORS = (
    *(".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".absmax", ".SCB"),
)
_CACHED_ONLY: int = getattr(os, "RWF_NOWAIT", 0)  # of preadv: else EAGAIN; 0: not this system
_READ_BYTES = 1 << 28  # of one system call (kernels read at most just below 2 GiB)


class Checkpoint:
    """The tensors of a model directory: one safetensors file or an index and its shards.

    Reads are thread-safe; do not close during a read. Use it as a context manager or call
    :meth:`close`.

    Attributes:
        path: the model directory.
        tensors: all tensors, by name in the files.
        prefix: prefix of decoder tensor names, ``model.`` or nothing.
    """

    divisible = True

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], fds: dict[Path, int]):
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.prefix = name_prefix(self.tensors)
        self._fds = fds
        self._content: str | None = None

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a model directory and check every file's header.

        Looks for ``model.safetensors``, then ``model.safetensors.index.json`` with its shards,
        then a single other ``*.safetensors`` file. One descriptor per file stays open.

        Raises:
            CheckpointError: no such directory, no safetensors files, an index that does not match
                its shards, or a damaged or unreadable file; the message has advice.
        """
        path = Path(path)
        files, index = _weight_files(path)
        fds: dict[Path, int] = {}
        tensors: dict[str, TensorInfo] = {}
        with ExitStack() as on_error:
            for file in files:
                fds[file] = open_file(file)
                on_error.callback(os.close, fds[file])
                for name, info in parse_header(fds[file], file).items():
                    if name in tensors:
                        raise checkpoint_error(file, f"{name}: also in {tensors[name].path.name}")
                    tensors[name] = info
            _check_index(path / INDEX_FILE, index, tensors)
            on_error.pop_all()
        return cls(path, tensors, fds)

    def close(self) -> None:
        """Close the files; idempotent."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def fingerprint(self) -> str:
        """Identify the model's content: 32 hex digits of a SHA-256.

        Covers the :class:`ModelConfig`, and the name, dtype, shape and bytes of every tensor. It
        does not depend on how the weights are sharded into files. Call :meth:`hash_content`
        first, in a thread: otherwise the first use hashes.

        Raises:
            CheckpointError: missing or invalid config.json, or a failed read.
            ConfigError: config.json is not supported.
        """
        if self._content is None:
            self.hash_content()
        assert self._content is not None
        config = ModelConfig.from_dir(self.path).to_json()
        return hashlib.sha256(f"{config}{self._content}".encode()).hexdigest()[:32]

    def hash_content(self, progress: ProgressCallback = ignore_progress) -> None:
        """Hash all tensors, unless the hash of these files is cached.

        Hashes are cached in the user's cache folder with every file's size, inode and times of
        change; see :mod:`tpirt.weights.fingerprint`.

        Raises:
            CheckpointError: a read failed or came short.
        """
        if self._content is None:
            self._content = content_digest(self.tensors.values(), self._fds, self._fill, progress)

    def cut(
        self, config: ModelConfig, shard: Shard, blocks: Iterable[Block]
    ) -> Generator[tuple[int, int, memoryview]]:
        """Yield the bytes of ``blocks``; see :func:`tpirt.weights.slicer.slice_bytes`."""
        _, head = resolve_tied(self, config)
        return slice_bytes(self, head, blocks)

    def source_name(self, name: str, head_name: str) -> str:
        """Map an unprefixed name to the name in this checkpoint.

        Args:
            name: such as ``layers.0.mlp.up_proj.weight``, ``norm.weight`` or ``lm_head.weight``.
            head_name: name of the LM head, from :func:`resolve_tied`.
        """
        return head_name if name == LM_HEAD else self.prefix + name

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor, in the checkpoint's dtype.

        Raises:
            CheckpointError: no such tensor; a read failed or came short.
        """
        info = self._info(name)
        out = torch.empty(info.shape, dtype=info.dtype)
        self._fill(info, 0, tensor_bytes(out))
        return out

    def read_rows(
        self, name: str, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read rows ``start <= i < stop`` of dimension 0: one contiguous range of bytes.

        Args:
            name: name in the checkpoint of a tensor, 1-D or more.
            start: first row.
            stop: end of the rows, exclusive.
            out: contiguous CPU tensor of the result's shape and dtype to read into.

        Returns:
            ``out``, or a new tensor in the checkpoint's dtype.

        Raises:
            CheckpointError: no such tensor or rows; a read failed or came short, and the content
                of ``out`` is undefined.
        """
        info = self._info(name)
        _check_range(info, 0, start, stop)
        shape = (stop - start, *info.shape[1:])
        if out is None:
            out = torch.empty(shape, dtype=info.dtype)
        assert (out.shape, out.dtype) == (shape, info.dtype), (name, out.shape, out.dtype)
        self._fill(info, start * _row_bytes(info), tensor_bytes(out))
        return out

    def read_columns(
        self,
        name: str,
        row_start: int,
        row_stop: int,
        col_start: int,
        col_stop: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read a rectangle of a matrix into ``out`` or a new tensor, in the checkpoint's dtype.

        Reads whole rows and cuts the columns out, unless 128 KiB or more per row would be
        discarded: then it reads the part of each row separately. Memory: the result and 1 MiB.

        Raises:
            CheckpointError: no such tensor, not a matrix, no such rows or columns; a read failed
                or came short.
        """
        info = self._info(name)
        _check_matrix(info)
        _check_range(info, 0, row_start, row_stop)
        _check_range(info, 1, col_start, col_stop)
        if (col_start, col_stop) == (0, info.shape[1]):
            return self.read_rows(name, row_start, row_stop, out)
        shape = (row_stop - row_start, col_stop - col_start)
        if out is None:
            out = torch.empty(shape, dtype=info.dtype)
        assert (out.shape, out.dtype) == (shape, info.dtype), (name, out.shape, out.dtype)
        segment, row = out.shape[1] * info.dtype.itemsize, _row_bytes(info)
        if row - segment >= _SKIP_BYTES or row > _ROWS_BYTES:
            self._fill_segments(info, row_start, col_start, out)
        elif out.numel():
            self._fill_from_rows(info, row_start, col_start, out)
        return out

    def gather_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Read single rows of a matrix by number, for embedding look-ups.

        Args:
            name: name of the matrix in the checkpoint.
            rows: row numbers in any order, possibly repeated.

        Returns:
            (len(rows), columns), in the checkpoint's dtype.

        Raises:
            CheckpointError: no such tensor, not a matrix, no such row; a read failed.
        """
        try:
            return self._gather_rows(name, rows)
        except OSError as exc:
            raise read_error(self._info(name).path, name, exc) from exc

    def gather_cached_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor | None:
        """As :meth:`gather_rows`, without waiting for a disk.

        Returns:
            None if some rows are not in the page cache, or the system does not tell.

        Raises:
            CheckpointError: no such tensor, not a matrix, no such row.
        """
        if not _CACHED_ONLY:
            return None
        try:
            return self._gather_rows(name, rows, _CACHED_ONLY)
        except OSError:
            return None

    def _gather_rows(self, name: str, rows: Sequence[int], flags: int = 0) -> torch.Tensor:
        info = self._info(name)
        _check_matrix(info)
        out = torch.empty((len(rows), info.shape[1]), dtype=info.dtype)
        memory, row_bytes = tensor_bytes(out), _row_bytes(info)
        for index, row in enumerate(rows):
            _check_range(info, 0, row, row + 1)
            target = memory[index * row_bytes : (index + 1) * row_bytes]
            self._read(info, row * row_bytes, target, flags)
        return out

    def _fill_segments(
        self, info: TensorInfo, row_start: int, col_start: int, out: torch.Tensor
    ) -> None:
        memory, row_bytes = tensor_bytes(out), _row_bytes(info)
        segment = out.shape[1] * info.dtype.itemsize
        first = row_start * row_bytes + col_start * info.dtype.itemsize
        for row in range(out.shape[0]):
            target = memory[row * segment : (row + 1) * segment]
            self._fill(info, first + row * row_bytes, target)

    def _fill_from_rows(
        self, info: TensorInfo, row_start: int, col_start: int, out: torch.Tensor
    ) -> None:
        step = max(1, _ROWS_BYTES // _row_bytes(info))
        rows, columns = out.shape
        piece = torch.empty((min(step, rows), info.shape[1]), dtype=info.dtype)
        for start in range(0, rows, step):
            part = piece[: min(step, rows - start)]
            self._fill(info, (row_start + start) * _row_bytes(info), tensor_bytes(part))
            out[start : start + step] = part[:, col_start : col_start + columns]

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise checkpoint_error(self.path, f"{name}: no such tensor") from None

    def _fill(self, info: TensorInfo, start: int, target: memoryview) -> None:
        """Read the tensor's bytes from ``start`` on until ``target`` is full."""
        try:
            self._read(info, start, target)
        except OSError as exc:
            raise read_error(info.path, info.name, exc) from exc

    def _read(self, info: TensorInfo, start: int, target: memoryview, flags: int = 0) -> None:
        """As :meth:`_fill`; raises OSError where the system does."""
        fd = self._fds.get(info.path)
        if fd is None:
            raise CheckpointError(f"{info.path}: {info.name}: read after close")
        done = 0
        while done < len(target):
            part = target[done : done + _READ_BYTES]
            count = os.preadv(fd, [part], info.offset + start + done, flags)
            if count == 0:
                raise checkpoint_error(
                    info.path,
                    f"{info.name}: the file was truncated while open",
                    expected=f"{len(target)} bytes at {info.offset + start}",
                    got=done,
                )
            done += count


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check that the checkpoint matches the configuration.

    Every required tensor must exist in float32, float16 or bfloat16, with its shape. Tensors of
    other modules and stored rotary buffers are ignored. An additional tensor in the decoder's
    modules (a bias, a norm, another layer) would change the result and is an error.

    Raises:
        CheckpointError: missing or additional tensors, or one of another shape or dtype; the
            message has the first tensor and their number.
    """
    _check_prefix(checkpoint)
    _check_not_quantized(checkpoint)
    embedding, head = resolve_tied(checkpoint, config)
    expected = {unprefixed_name(name): shape for name, shape in expected_tensors(config).items()}
    expected = {checkpoint.prefix + name: s for name, s in expected.items() if name != LM_HEAD}
    expected.pop(checkpoint.prefix + EMBEDDING)
    expected |= {embedding: head_shape(config), head: head_shape(config)}
    _check_none(
        checkpoint,
        [name for name in expected if name not in checkpoint.tensors],
        "missing from the checkpoint",
        "config.json describes another model, or files are missing; download both again",
    )
    for name, shape in expected.items():
        _check_tensor(checkpoint.tensors[name], shape)
    _check_none(
        checkpoint,
        [n for n, i in checkpoint.tensors.items() if n not in expected and _matters(i)],
        "in the checkpoint but unknown to its config.json, and it would change the result",
        "config.json describes another model; download both again",
    )


def resolve_tied(checkpoint: Checkpoint, config: ModelConfig) -> tuple[str, str]:
    """Find the embedding and the LM head.

    With tied embeddings, one tensor can be both. If the checkpoint has two, they are used
    separately, as in transformers.

    Returns:
        (embedding, LM head), names in the checkpoint.

    Raises:
        CheckpointError: untied and one is missing, or both are.
    """
    embedding = checkpoint.prefix + EMBEDDING
    there = [name for name in (embedding, LM_HEAD) if name in checkpoint.tensors]
    if len(there) == 2:
        return embedding, LM_HEAD
    if len(there) == 1 and config.tie_word_embeddings:
        return there[0], there[0]
    missing = [name for name in (embedding, LM_HEAD) if name not in there]
    tied = "true" if config.tie_word_embeddings else "false"
    raise checkpoint_error(
        checkpoint.path,
        f"{missing[0]}: missing from the checkpoint (tie_word_embeddings is {tied})",
        advice="config.json describes another model, or files are missing; download both again",
    )


# -- finding the files -----------------------------------------------------------------------


def _weight_files(path: Path) -> tuple[list[Path], Mapping[str, str]]:
    """Return the files to open, and the index (tensor name -> file name) if there is one."""
    names = _list_directory(path)
    if SINGLE_FILE in names:
        return [path / SINGLE_FILE], {}
    if INDEX_FILE in names:
        index = _read_index(path / INDEX_FILE)
        for name in sorted(set(index.values()) - names):
            raise checkpoint_error(
                path / INDEX_FILE,
                f"{name}: missing shard",
                advice="copy or download it into the same directory",
            )
        return [path / name for name in sorted(set(index.values()))], index
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if len(files) == 1:
        return [path / files[0]], {}
    raise checkpoint_error(path, _why_no_weights(files, names), advice=_what_to_do(names))


def _list_directory(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: no such model directory") from exc
    except NotADirectoryError as exc:
        raise CheckpointError(f"{path}: expected a model directory, got a file") from exc
    except OSError as exc:
        raise read_error(path, "the directory", exc) from exc


def _why_no_weights(files: list[str], names: Iterable[str]) -> str:
    if files:
        return f"{len(files)} safetensors files but neither {SINGLE_FILE} nor {INDEX_FILE}"
    others = sorted(n for n in names if n.endswith((".bin", ".pth", ".pt", ".gguf")))
    return f"no safetensors files, found only {others[0]}" if others else "no safetensors files"


def _what_to_do(names: Iterable[str]) -> str:
    if any(name.endswith(".safetensors") for name in names):
        return f"download {INDEX_FILE} as well"
    if any(name.endswith(".gguf") for name in names):
        return "take the repository that the GGUF file was made from, and --quantize int4"
    if any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        return "download the safetensors files, or convert it as docs/models.md says"
    return f"a model directory has config.json, tokenizer and {SINGLE_FILE} (or shards)"


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        content = json.loads(read_regular(path))
    except OSError as exc:
        raise read_error(path, "the index", exc) from exc
    except (ValueError, RecursionError) as exc:
        raise checkpoint_error(path, f"not valid JSON ({exc})") from exc
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index:
        raise checkpoint_error(path, "weight_map", expected="tensor names and files", got="none")
    for name, file in index.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file:
            raise checkpoint_error(
                path, name, expected="a file name without a directory", got=repr(file)[:80]
            )
    return index


def _check_index(path: Path, index: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in index.items():
        if name not in tensors or tensors[name].path.name != file:
            got = tensors[name].path.name if name in tensors else "no such tensor in any shard"
            raise checkpoint_error(
                path, name, expected=f"in {file}", got=got, advice="download the shards again"
            )


# -- reading and checking --------------------------------------------------------------------


def _row_bytes(info: TensorInfo) -> int:
    return info.nbytes // info.shape[0] if info.shape[0] else 0


def _check_matrix(info: TensorInfo) -> None:
    if len(info.shape) != 2:
        raise checkpoint_error(info.path, info.name, expected="a matrix", got=info.shape)


def _check_range(info: TensorInfo, dim: int, start: int, stop: int) -> None:
    if len(info.shape) <= dim or not 0 <= start <= stop <= info.shape[dim]:
        kind = ("rows", "columns")[dim]
        raise checkpoint_error(
            info.path,
            f"{info.name}: {kind}",
            expected=f"a range within its shape {info.shape}",
            got=f"{start} to {stop}",
            advice="the request does not fit the model",
        )


def _check_prefix(checkpoint: Checkpoint) -> None:
    parts = [name for name in checkpoint.tensors if is_model_part(name)]
    prefixed = [name for name in parts if name.startswith(PREFIX)]
    bare = [name for name in parts if not name.startswith((PREFIX, "lm_head."))]
    if prefixed and bare:
        raise checkpoint_error(
            checkpoint.path,
            f"names with and without the prefix model. are mixed ({prefixed[0]}, {bare[0]})",
            advice="use one model's files only",
        )


def _check_not_quantized(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensors:
        if name.endswith(_QUANTIZED_TENSORS):
            raise CheckpointError(f"{checkpoint.path}: {name}: {QUANTIZED}")


def _check_tensor(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise checkpoint_error(
            info.path,
            info.name,
            expected=shape,
            got=info.shape,
            advice="config.json describes another model; download both again",
        )
    if info.dtype not in CHECKPOINT_DTYPES:
        raise checkpoint_error(
            info.path,
            info.name,
            expected="float32, float16 or bfloat16",
            got=dtype_name(info.dtype),
            advice=QUANTIZED if info.dtype.itemsize < 8 else "save the model in float32",
        )


def _matters(info: TensorInfo) -> bool:
    return is_model_part(info.name) and info.dtype.is_floating_point


def _check_none(checkpoint: Checkpoint, names: list[str], problem: str, advice: str) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise checkpoint_error(checkpoint.path, f"{names[0]}{more}: {problem}", advice=advice)
