"""Getting every rank its slice: found in a store, written to one, or sent to a worker."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from tpirt.cluster.cancellation import in_thread
from tpirt.config import ModelConfig
from tpirt.errors import PeerLostError, StoreError
from tpirt.parallel.format import WeightFormat
from tpirt.parallel.partition import Plan, Shard
from tpirt.parallel.sharding import rank_blocks
from tpirt.transport.base import PeerClient
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.types import Progress, ProgressCallback
from tpirt.weights.checkpoint import Checkpoint, resolve_tied
from tpirt.weights.slicer import block_bytes
from tpirt.weights.store import Manifest, SliceStore, StoredSlice


@dataclass(frozen=True)
class SliceMaker:
    """Cuts slices of one model in one form."""

    checkpoint: Checkpoint
    config: ModelConfig
    form: WeightFormat

    def manifest(self, shard: Shard) -> Manifest:
        """Describe the slice of one rank."""
        blocks = rank_blocks(self.config, shard, self.form)
        name = self.checkpoint.path.resolve().name
        return Manifest.plan(self.checkpoint.fingerprint, name, self.form, shard, blocks)

    def pieces(self, shard: Shard) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (block, offset, bytes) of all the slice's block files, in order.

        Raises:
            CheckpointError: a read failed or came short.
        """
        _, head = resolve_tied(self.checkpoint, self.config)
        for index, block in enumerate(rank_blocks(self.config, shard, self.form)):
            offset = 0
            for piece in block_bytes(self.checkpoint, head, block):
                yield index, offset, piece
                offset += len(piece)


def write_slice(
    maker: SliceMaker, shard: Shard, store: SliceStore, progress: ProgressCallback, rank: int
) -> StoredSlice:
    """Return a rank's slice from the store, written first if it is missing or damaged.

    Raises:
        StoreError: the store cannot be written or its disk is full.
        CheckpointError: a read failed.
    """
    manifest = maker.manifest(shard)
    with contextlib.suppress(StoreError):  # damaged: made anew
        found = store.find(manifest.slice_id)
        if found is not None:
            return found
    with store.write(manifest) as writer:
        done = 0
        for block, offset, data in maker.pieces(shard):
            writer.write(block, offset, data)
            done += len(data)
            progress(Progress("slicing", done, manifest.nbytes, detail=f"rank {rank}"))
        return writer.commit()


async def send_slice(
    maker: SliceMaker,
    shard: Shard,
    client: PeerClient,
    progress: ProgressCallback,
    rank: int,
    timeout_s: float,
) -> int:
    """Cut a rank's slice and send it to its worker as it is cut; returns the bytes sent.

    Raises:
        PeerLostError: the worker is gone, or took nothing for ``timeout_s``.
        StoreError: the worker could not keep it.
        CheckpointError: a read failed.
    """
    manifest = maker.manifest(shard)
    loop = asyncio.get_running_loop()

    async def chunks() -> AsyncIterator[pb.SliceChunk]:
        yield pb.SliceChunk(manifest=manifest.to_json())
        done = 0
        pieces = maker.pieces(shard)
        while (chunk := await in_thread(_next_chunk, pieces)) is not None:
            if not deadline.expired():
                deadline.reschedule(loop.time() + timeout_s)
            yield pb.SliceChunk(chunk=chunk)
            done += len(chunk.data)
            progress(Progress("sending slice", done, manifest.nbytes, detail=f"rank {rank}"))

    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return (await client.put_slice(chunks())).bytes_written
    except TimeoutError as exc:
        raise PeerLostError(
            f"peer {client.peer_id}: took no data of its slice for {timeout_s:g} s; it, its disk "
            "or its link hangs"
        ) from exc


def _next_chunk(pieces: Iterator[tuple[int, int, memoryview]]) -> pb.BlockChunk | None:
    for block, offset, data in pieces:
        raw = bytes(data)
        return pb.BlockChunk(block=block, offset=offset, crc32=zlib.crc32(raw), data=raw)
    return None


def split_model(
    maker: SliceMaker, plan: Plan, stores: list[SliceStore], progress: ProgressCallback
) -> list[StoredSlice]:
    """Write every rank's slice, rank ``r`` into ``stores[r]``; see :func:`write_slice`."""
    return [
        write_slice(maker, shard, store, progress, rank)
        for rank, (shard, store) in enumerate(zip(plan.shards, stores, strict=True))
    ]
