"""Cut a rank's slice out of a checkpoint: read, convert and yield bytes in order.

A few threads work ahead of the consumer, so that reading and quantizing overlap with writing or
sending. Memory is a few MiB per thread and 16 MiB of finished bytes, independent of the sizes of
the model and of its tensors.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from tpirt.errors import CheckpointError
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.ops.quant import Scheme
from tpirt.ops.quant_regions import matrix_regions
from tpirt.ops.quant_rounding import Workspace, rows_at_once
from tpirt.sharding.blocks import Block, Piece, StoredTensor
from tpirt.weights.header import RECOPY
from tpirt.weights.layout import block_header

if TYPE_CHECKING:
    from tpirt.weights.checkpoint import Checkpoint

_YIELDED_BYTES = 4 << 20  # maximum size of the pieces that are yielded

_CONVERTED = 1 << 18  # elements converted at once

# Bytes prepared ahead of the consumer: threads continue while a block is flushed to disk.
_AHEAD_BYTES = 8 << 20

# More threads than this only contend for the GIL.
_MOST_THREADS = 4


def slice_bytes(
    checkpoint: Checkpoint, head_name: str, blocks: Iterable[Block]
) -> Generator[tuple[int, int, memoryview]]:
    """Yield (index of block, offset in its file, bytes), in order, at most 4 MiB at a time.

    Uses torch's number of threads, at most four; the bytes do not depend on it. The checkpoint
    must stay open until the generator is exhausted or closed.

    Args:
        checkpoint: the checkpoint.
        head_name: checkpoint tensor of the LM head (the embedding if tied).
        blocks: the blocks to cut.

    Raises:
        CheckpointError: a read failed or came short, or a weight to be quantized is not finite;
            the message has file and tensor.
    """
    cutter = _Cutter(checkpoint, head_name)
    jobs = ((index, job) for index, block in enumerate(blocks) for job in cutter.jobs(block))
    current = offset = 0
    with _workers(min(torch.get_num_threads(), _MOST_THREADS)) as pool:
        for index, data in _in_order(pool, jobs):
            if index != current:
                current, offset = index, 0
            for start in range(0, len(data), _YIELDED_BYTES):
                piece = data[start : start + _YIELDED_BYTES]
                yield index, offset, piece
                offset += len(piece)


@dataclass(frozen=True)
class _Job:
    """Some bytes of a block file: their number, and a function that makes them in any thread."""

    nbytes: int
    make: Callable[[], memoryview]

    @classmethod
    def done(cls, data: memoryview) -> _Job:
        """A job for bytes that exist."""
        return cls(len(data), lambda: data)


class _Cutter:
    """Turns blocks into jobs."""

    def __init__(self, checkpoint: Checkpoint, head_name: str):
        self._checkpoint = checkpoint
        self._head_name = head_name
        self._own = _OfThread()

    def jobs(self, block: Block) -> Iterator[_Job]:
        """Yield jobs for a block's file, in order."""
        yield _Job.done(memoryview(block_header(block)))
        end = 0
        for tensor, offset in zip(block.tensors, block.offsets, strict=True):
            if offset > end:
                yield _Job.done(memoryview(bytes(offset - end)))
            quantized = isinstance(tensor.quant, Scheme)
            yield from self._quantized(tensor) if quantized else self._plain(tensor)
            end = offset + tensor.nbytes

    def _plain(self, tensor: StoredTensor) -> Iterator[_Job]:
        elements = math.prod(tensor.shape[1:])
        for start, stop in _parts(tensor.shape[0], max(1, _CONVERTED // elements)):
            nbytes = (stop - start) * elements * tensor.dtype.itemsize
            yield _Job(nbytes, partial(self._convert, tensor, start, stop))

    def _convert(self, tensor: StoredTensor, start: int, stop: int) -> memoryview:
        out = _fresh(tensor.dtype, (stop - start, *tensor.shape[1:]))
        self._fill(out, tensor, start, stop)
        return tensor_bytes(out)

    def _quantized(self, tensor: StoredTensor) -> Iterator[_Job]:
        rows, in_features = tensor.shape
        codes, scales = tensor.regions
        kept = torch.zeros(scales.shape, dtype=scales.dtype)
        for start, stop in _parts(rows, rows_at_once(in_features)):
            nbytes = codes.nbytes * (stop - start) // rows
            yield _Job(nbytes, partial(self._quantize, tensor, start, stop, kept))
        if scales.offset > codes.end:
            yield _Job.done(memoryview(bytes(scales.offset - codes.end)))
        # Scales come after all codes, so they are complete before they are read.
        yield _Job.done(tensor_bytes(kept))

    def _quantize(
        self, tensor: StoredTensor, start: int, stop: int, scales: torch.Tensor
    ) -> memoryview:
        spec = tensor.quant
        assert isinstance(spec, Scheme)
        sources = {name for name, _, _, _ in self._sources(tensor, start, stop)}
        dtypes = {self._checkpoint.tensors[name].dtype for name in sources}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        w = self._own.space.take("weights", dtype, stop - start, tensor.shape[1])
        self._fill(w, tensor, start, stop)
        region = matrix_regions(spec, stop - start, tensor.shape[1])[0]
        codes = _fresh(region.dtype, region.shape)
        try:
            spec.round_rows(w, start, codes, scales, self._own.space)
        except CheckpointError as exc:
            # Finite weights are as they were trained: another copy is the same.
            advice = "--quantize int8 or none" if w.isfinite().all() else RECOPY
            names = ", ".join(sorted(sources))
            raise CheckpointError(f"{self._checkpoint.path}: {names}: {exc}; {advice}") from exc
        return tensor_bytes(codes)

    def _fill(self, out: torch.Tensor, tensor: StoredTensor, start: int, stop: int) -> None:
        """Read some rows of a stored tensor, converted to ``out``'s dtype."""
        done = 0
        for name, piece, low, high in self._sources(tensor, start, stop):
            part = out[done : done + high - low]
            done += high - low
            dtype = self._checkpoint.tensors[name].dtype
            same = dtype == out.dtype
            raw = part if same else self._own.space.take("raw", dtype, *part.shape)
            if piece.columns is None:
                self._checkpoint.read_rows(name, low, high, raw)
            else:
                self._checkpoint.read_columns(name, low, high, *piece.columns, raw)
            if not same:
                part.copy_(raw)

    def _sources(
        self, tensor: StoredTensor, start: int, stop: int
    ) -> Iterator[tuple[str, Piece, int, int]]:
        """Yield the sources of rows ``start`` to ``stop``: checkpoint tensor, piece, its rows."""
        first = 0
        for piece in tensor.pieces:
            low, high = max(start - first, 0), min(stop - first, piece.rows.size)
            if low < high:
                name = self._checkpoint.source_name(piece.source, self._head_name)
                yield name, piece, piece.rows.start + low, piece.rows.start + high
            first += piece.rows.size


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.space = Workspace()


def _fresh(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Allocate memory that is returned to the system after its last use, in any thread."""
    return page_buffer(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _parts(rows: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in which torch does not start other threads."""
    before = torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread copies the process-wide number
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(count, "tpirt-slicer", initializer=begin)
    try:
        for _ in range(count):
            pool.submit(int)
        ready.wait()
        torch.set_num_threads(before)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[tuple[int, _Job]]
) -> Iterator[tuple[int, memoryview]]:
    """Run jobs in parallel; yield their bytes in order."""
    under_way: deque[tuple[int, _Job, Future[memoryview]]] = deque()
    ahead = 0
    for index, job in jobs:
        under_way.append((index, job, pool.submit(job.make)))
        ahead += job.nbytes
        while ahead > _AHEAD_BYTES:
            first, oldest, future = under_way.popleft()
            ahead -= oldest.nbytes
            yield first, future.result()
    for index, _, future in under_way:
        yield index, future.result()
