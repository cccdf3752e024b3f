"""Getting every rank its slice: found in a store, written to one, or sent to a worker."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tpirt.cluster.cancellation import in_thread
from tpirt.collectives.context import StepAborted
from tpirt.config import ModelConfig
from tpirt.errors import StoreError
from tpirt.protocol.messages import (
    LackingReply,
    LackingRequest,
    PutUnitsReply,
    UnitChunk,
    decode_call,
    encode_call,
)
from tpirt.sharding.blocks import rank_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Plan, Shard
from tpirt.transport.base import PeerClient
from tpirt.types import Progress, ProgressCallback
from tpirt.weights.checkpoint import Checkpoint, resolve_tied
from tpirt.weights.slicer import slice_bytes
from tpirt.weights.store import Manifest, SlicePiece, SliceStore, StoredSlice
from tpirt.weights.synthetic import AnyCheckpoint


@dataclass(frozen=True)
class SliceMaker:
    """Makes slices of one model in one form."""

    checkpoint: AnyCheckpoint
    config: ModelConfig
    form: WeightFormat

    def manifest(self, shard: Shard) -> Manifest:
        """Describe the slice of one rank."""
        blocks = rank_blocks(self.config, shard, self.form)
        name = self.checkpoint.path.resolve().name
        return Manifest.plan(self.checkpoint.fingerprint, name, self.form, shard, blocks)

    def stored(self, shard: Shard, store: SliceStore) -> StoredSlice | None:
        """Find the slice of one rank; None where it is missing or damaged."""
        try:
            return store.find(self.manifest(shard).slice_id)
        except StoreError:
            return None

    def pieces(self, plan: Plan, rank: int, store: SliceStore) -> Generator[SlicePiece]:
        """Yield all bytes of a rank's slice, in order: as ``store`` has them, else cut anew.

        Threads read the checkpoint ahead until the generator is at its end or closed.

        Raises:
            CheckpointError: a read of the checkpoint failed or came short; there is none, and
                ``store`` lacks the slice.
            StoreError: a read of the stored slice failed, or it is damaged; names the file.
        """
        shard = plan.shards[rank]
        stored = self.stored(shard, store)
        if stored is not None:
            return stored.pieces()
        if not isinstance(self.checkpoint, Checkpoint):
            raise self.checkpoint.lacks(plan, rank, self.form, store.root)
        _, head = resolve_tied(self.checkpoint, self.config)
        return slice_bytes(self.checkpoint, head, rank_blocks(self.config, shard, self.form))


def write_slice(
    maker: SliceMaker, plan: Plan, rank: int, store: SliceStore, progress: ProgressCallback
) -> StoredSlice:
    """Return a rank's slice from the store, written first if it is missing or damaged.

    Raises:
        StoreError: the store cannot be written or its disk is full.
        CheckpointError: a read failed, or there is no checkpoint to cut it from.
    """
    found = maker.stored(plan.shards[rank], store)
    if found is not None:
        return found
    manifest = maker.manifest(plan.shards[rank])

    def report(done: int) -> None:
        progress(Progress("slicing", done, manifest.nbytes, detail=f"rank {rank}"))

    with contextlib.closing(maker.pieces(plan, rank, store)) as pieces:
        return keep_slice(manifest, pieces, store, report)


def keep_slice(
    manifest: Manifest,
    pieces: Iterable[SlicePiece],
    store: SliceStore,
    report: Callable[[int], None],
) -> StoredSlice:
    """Write a slice from its bytes; ``report`` is called with how many are written.

    Raises:
        StoreError: the store cannot be written or its disk is full.
    """
    done = 0
    with store.write(manifest) as writer:
        for block, offset, data in pieces:
            writer.write(block, offset, data)
            done += len(data)
            report(done)
        return writer.commit()


async def send_slice(
    maker: SliceMaker,
    plan: Plan,
    rank: int,
    store: SliceStore,
    client: PeerClient,
    progress: ProgressCallback,
    timeout_s: float,
) -> int:
    """Send a rank's slice to its worker, out of ``store`` or as it is cut; returns the bytes sent.

    Raises:
        PeerLostError: the worker is gone, or took nothing for ``timeout_s``.
        StoreError: the worker could not keep it, or the stored slice cannot be read.
        CheckpointError: a read failed, or there is no checkpoint to cut it from.
    """
    manifest = maker.manifest(plan.shards[rank])
    pieces = _ChunkSource(await in_thread(maker.pieces, plan, rank, store))

    async def chunks() -> AsyncIterator[bytes]:
        yield encode_call(UnitChunk(manifest=manifest.to_json()))
        done = 0
        while (chunk := await in_thread(pieces.next)) is not None:
            yield encode_call(chunk)
            done += len(chunk.data)
            progress(Progress("sending slice", done, manifest.nbytes, detail=f"rank {rank}"))

    try:
        reply = await client.upload("PutUnits", chunks(), timeout_s)
        return decode_call(PutUnitsReply, reply, client.peer_id).bytes_written
    finally:
        await in_thread(pieces.close)


class _ChunkSource:
    """The pieces of a slice as messages, for one thread at a time."""

    def __init__(self, pieces: Generator[SlicePiece]):
        self._pieces = pieces
        self._lock = threading.Lock()

    def next(self) -> UnitChunk | None:
        """The next one; None at the end, and when closed."""
        with self._lock:
            return _next_chunk(self._pieces)

    def close(self) -> None:
        """Stop cutting; when this returns, the checkpoint is no longer read."""
        with self._lock:
            self._pieces.close()


def _next_chunk(pieces: Iterator[SlicePiece]) -> UnitChunk | None:
    for block, offset, data in pieces:
        raw = bytes(data)
        return UnitChunk(unit=block, offset=offset, crc32=zlib.crc32(raw), data=raw)
    return None


def split_model(
    maker: SliceMaker, plan: Plan, stores: list[SliceStore], progress: ProgressCallback
) -> list[StoredSlice]:
    """Write every rank's slice, rank ``r`` into ``stores[r]``; see :func:`write_slice`."""
    return [write_slice(maker, plan, rank, store, progress) for rank, store in enumerate(stores)]


async def distribute(
    makers: Sequence[SliceMaker],
    plan: Plan,
    store: SliceStore,
    clients: Sequence[PeerClient],
    timeout_s: float,
    progress: ProgressCallback,
) -> None:
    """Provide every rank with its slice: rank 0 in ``store``, workers in their own stores.

    ``makers[r]`` makes rank ``r``'s slice in the format of its CPU. What ``store`` has is sent as
    it is; the rest is cut.

    Raises:
        CheckpointError, StoreError, PeerLostError: the slice could not be made or kept.
    """
    await _in_thread(write_slice, makers[0], plan, 0, store, progress)
    # One after another: in parallel they would compete for the same disk.
    for rank, client in enumerate(clients, start=1):
        request = LackingRequest(makers[rank].manifest(plan.shards[rank]).to_json())
        answer = await client.call("Lacking", encode_call(request), 60.0)
        if decode_call(LackingReply, answer, client.peer_id).units:
            await send_slice(makers[rank], plan, rank, store, client, progress, timeout_s)


async def _in_thread(
    write: Callable[[SliceMaker, Plan, int, SliceStore, ProgressCallback], StoredSlice],
    maker: SliceMaker,
    plan: Plan,
    rank: int,
    store: SliceStore,
    progress: ProgressCallback,
) -> StoredSlice:
    """Run ``write`` in a thread; cancelled, it has ended and left nothing when this raises."""
    cancelled = threading.Event()

    def report(step: Progress) -> None:
        if cancelled.is_set():
            raise StepAborted
        progress(step)

    return await in_thread(write, maker, plan, rank, store, report, on_cancel=cancelled.set)
