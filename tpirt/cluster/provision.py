"""Provide every rank with its slice: found in a store, assembled from its units, or sent.

A slice is identified by its content, so the master needs the digests of all units first: from its
own records, or by cutting the units that a store reports. Only missing units, and units with other
content, are written or sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tpirt.cancellation import in_thread
from tpirt.cluster import calls
from tpirt.cluster.roster import ask
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.collectives.context import StepAborted
from tpirt.errors import PeerLostError, PeerUnreachableError, StoreError, TpirtError
from tpirt.protocol.messages import (
    InventoryReply,
    InventoryRequest,
    UnitChunk,
    encode_call,
)
from tpirt.sharding.partition import Partition, Shard
from tpirt.sharding.units import Unit
from tpirt.transport.base import PeerClient
from tpirt.types import Progress, ProgressCallback
from tpirt.units import format_bytes
from tpirt.weights.manifest import (
    NO_DIGEST,
    Manifest,
    SliceOrder,
    SliceSpec,
    split_digests,
    unit_digest,
)
from tpirt.weights.store import SliceStore, StoredSlice, UnitPlace
from tpirt.weights.writer import SliceWriter

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# Bytes of a unit per message: a link of 100 kbit/s takes five seconds for one, far less than the
# silence after which the other side counts as lost.
CHUNK_BYTES = 64 << 10
_SLOW_DISK = 10e6  # bytes a second
_MOST_HOSTS = 4  # that are sent slices at once; each takes memory for a block or two here


@dataclass(frozen=True)
class Delivery:
    """How a store gets a slice.

    Attributes:
        digests: of all units; NO_DIGEST for units that are to be cut.
        lacking: numbers of the missing units, ascending.
    """

    digests: list[bytes]
    lacking: list[int]

    @property
    def kept(self) -> list[bytes]:
        """Digests of the units that the store takes from its own slices, NO_DIGEST for others."""
        kept = list(self.digests)
        for number in self.lacking:
            kept[number] = NO_DIGEST
        return kept


def plan_order(
    maker: SliceMaker,
    shard: Shard,
    held: Sequence[bytes],
    known: Sequence[bytes],
    progress: ProgressCallback,
) -> Delivery:
    """Compare a store's units with those of a slice.

    Units that this machine does not know are cut and compared, because reports of stores are not
    trusted.

    Args:
        maker: of the slice.
        shard: of the slice.
        held: digests by unit, as reported by the store; NO_DIGEST for missing ones.
        known: digests by unit, as known by this machine; NO_DIGEST for unknown ones.
        progress: called while units are cut.

    Raises:
        CheckpointError: a read failed.
    """
    digests = list(known)
    unknown = [n for n, digest in enumerate(held) if digest != NO_DIGEST == known[n]]
    total, done = sum(maker.spec(shard).unit_bytes(n) for n in unknown), 0
    with contextlib.closing(maker.cut(shard, unknown)) as units:
        for number, content in units:
            digests[number] = unit_digest(content)
            done += len(content)
            progress(Progress("checking slice", done, total))
    lacking = [n for n, digest in enumerate(held) if digest == NO_DIGEST or digest != digests[n]]
    return Delivery(digests, lacking)


def lacking_units(
    maker: SliceMaker, shard: Shard, order: Delivery, store: SliceStore
) -> Generator[tuple[int, memoryview]]:
    """Yield (number, canonical bytes) of the lacking units, block by block.

    Units are read from ``store`` if it has them with a known content, or else cut. Completes the
    order's digests. The model must stay open until the generator is exhausted or closed.

    Raises:
        CheckpointError: a read of the model failed.
        StoreError: a read of the store failed, or a file in it is damaged.
    """
    spec, index = maker.spec(shard), store.index(maker.spec(shard))
    places: dict[int, dict[Unit, UnitPlace]] = {}
    numbers: dict[tuple[int, Unit], int] = {}
    to_cut = []
    for number in order.lacking:
        block, unit = spec.places[number]
        digest = order.digests[number]
        place = None if digest == NO_DIGEST else index.find(unit.key, digest)
        if place is None:
            to_cut.append(number)
        else:
            places.setdefault(block, {})[unit] = place
            numbers[block, unit] = number
    with contextlib.closing(maker.cut(shard, to_cut)) as cut:
        waiting = next(cut, None)
        for block in range(len(spec.blocks)):
            for unit, content in index.read(places.get(block, {})):
                yield numbers[block, unit], content
            while waiting is not None and spec.places[waiting[0]][0] == block:
                number, content = waiting
                order.digests[number] = unit_digest(content)
                yield number, content
                waiting = next(cut, None)


def write_slice(
    maker: SliceMaker,
    partition: Partition,
    rank: int,
    store: SliceStore,
    progress: ProgressCallback,
) -> StoredSlice:
    """Return a rank's slice from the store, written first if it is missing or damaged.

    Raises:
        StoreError: the store cannot be written or its disk is full.
        CheckpointError: a read of the model failed.
    """
    shard = partition.shards[rank]
    found = maker.stored(shard, store)
    if found is not None:
        return found
    spec = maker.spec(shard)
    # One line for all ranks, whose slices are as old as that of the first.
    if rank == 0 and any(each.is_remade_as(spec) for each in store.unusable()):
        _log.warning(
            "%s: slices of %s were written by an older tpirt and are remade; "
            "`tpirt store rm --unusable` removes the old ones",
            *(store.root, spec.model),
        )
    known = store.known(spec)
    order = plan_order(maker, shard, store.inventory(spec, known), known, progress)
    done = 0

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(Progress("slicing", done, max(done, spec.nbytes), detail=f"rank {rank}"))

    with SliceWriter(store, spec, order.kept) as writer:
        _log.info("%s", store.growth(spec, writer.new_bytes))
        if len(order.lacking) == len(spec.places):  # no need to take blocks to pieces
            _write_blocks(maker, writer, report)
        else:
            with contextlib.closing(lacking_units(maker, shard, order, store)) as units:
                for number, content in units:
                    writer.put(number, content)
                    report(len(content))
        stored = writer.commit()
    maker.made(stored.manifest, store)
    return stored


def _write_blocks(maker: SliceMaker, writer: SliceWriter, report: Callable[[int], None]) -> None:
    shard = writer.spec.shard
    with contextlib.closing(maker.cut_blocks(shard, range(len(writer.spec.blocks)))) as blocks:
        for index, content in blocks:
            writer.put_block(index, content)
            report(len(content))


async def send_slice(
    maker: SliceMaker,
    partition: Partition,
    rank: int,
    store: SliceStore,
    client: PeerClient,
    progress: ProgressCallback,
    timeout_s: float,
    pace: Pace,
) -> int:
    """Provide a worker with its slice; returns the bytes of sent units.

    Raises:
        PeerLostError: the worker is gone, or received nothing for ``timeout_s``.
        StoreError: the worker could not keep it, or the store cannot be read.
        CheckpointError: a read of the model failed.
    """
    shard = partition.shards[rank]
    spec = await in_thread(maker.spec, shard)
    known = await in_thread(store.known, spec)
    held = await _ask(client, spec, known, timeout_s)
    order = await _stoppable(plan_order, maker, shard, held, known, progress=progress)
    if not order.lacking:
        manifest = await in_thread(Manifest.of, spec, order.digests)
        if await _holds(client, manifest, timeout_s):
            await in_thread(maker.made, manifest, store)
            return 0
    total = sum(spec.unit_bytes(number) for number in order.lacking)
    about = (rank, client.peer_id, spec.model, spec.label)
    if total:
        sizes = format_bytes(total), format_bytes(spec.nbytes)
        _log.info(
            "sending rank %d (%s) a new slice of %s (%s): its store lacks %s of %s", *about, *sizes
        )
    else:
        _log.info("rank %d (%s) makes a new slice of %s (%s) from what its store holds", *about)
    chunks = _Chunks(lacking_units(maker, shard, order, store))
    done = 0

    async def next_chunk() -> UnitChunk | None:
        with _about("master"):  # its own disk failed: the worker that it sends to is well
            return await in_thread(chunks.next)

    async def messages() -> AsyncGenerator[bytes, None]:
        nonlocal done
        yield encode_call(UnitChunk(order=SliceOrder(spec, order.kept).to_json()))
        while (chunk := await next_chunk()) is not None:
            await pace.wait(len(chunk.data))
            yield encode_call(chunk)
            done += len(chunk.data)
            progress(Progress("sending slice", done, total, detail=f"rank {rank}"))

    kept = spec.nbytes - total  # which the worker reads, and says nothing meanwhile
    try:
        async with contextlib.aclosing(messages()) as sending:
            upload = client.upload("PutUnits", sending, timeout_s + kept / _SLOW_DISK)
            with _about(client.peer_id):
                await _while_it_answers(client, upload, lambda: done, timeout_s)
    finally:
        await in_thread(chunks.close)
    await in_thread(lambda: maker.made(Manifest.of(spec, order.digests), store))
    return done


async def _while_it_answers(
    client: PeerClient, upload: Awaitable[object], taken: Callable[[], int], silent_s: float
) -> None:
    """Await an upload, until its worker takes nothing for ``silent_s`` and does not answer either.

    One that reads what it keeps takes nothing for long, but answers. On a slow link the answer may
    be late, for the question waits behind a chunk; then the chunk is taken meanwhile.

    Raises:
        PeerLostError: it is silent; the upload has ended.
    """
    uploading = asyncio.ensure_future(upload)
    try:
        while not uploading.done():
            before = taken()
            await asyncio.wait({uploading}, timeout=silent_s / 2)
            if uploading.done() or taken() != before:
                continue
            try:
                await ask(client, 0, silent_s / 2)
            except PeerUnreachableError:
                if not uploading.done() and taken() == before:
                    raise PeerLostError(
                        f"peer {client.peer_id}: took nothing and answered nothing for "
                        f"{silent_s:g} s; it hangs, or its link does"
                    ) from None
        await uploading
    finally:
        uploading.cancel()
        await asyncio.gather(uploading, return_exceptions=True)


async def _ask(
    client: PeerClient, spec: SliceSpec, known: Sequence[bytes], timeout_s: float
) -> list[bytes]:
    """Request the digests of a worker's units."""
    order = await in_thread(SliceOrder(spec, list(known)).to_json)
    reply = await _inventory(client, InventoryRequest(order=order), timeout_s)
    held = split_digests(reply.held)
    if len(held) != len(spec.places):
        with _about(client.peer_id):
            raise StoreError(
                f"peer {client.peer_id}: reported {len(held)} units, expected {len(spec.places)}"
            )
    return held


async def _holds(client: PeerClient, manifest: Manifest, timeout_s: float) -> bool:
    """Whether a worker holds a slice, all of it."""
    asked = InventoryRequest(slice_id=manifest.slice_id)
    return (await _inventory(client, asked, timeout_s)).whole


async def _inventory(
    client: PeerClient, request: InventoryRequest, timeout_s: float
) -> InventoryReply:
    with _about(client.peer_id):
        return await calls.ask(client, "Inventory", request, InventoryReply, timeout_s)


@contextlib.contextmanager
def _about(peer_id: str) -> Iterator[None]:
    """Errors that are raised within are about this peer, if not about another one."""
    try:
        yield
    except TpirtError as exc:
        exc.peer_id = exc.peer_id or peer_id
        raise


class _Chunks:
    """Units as messages, for one thread at a time."""

    def __init__(self, units: Generator[tuple[int, memoryview]]):
        self._units = units
        self._chunks = unit_chunks(units)
        self._lock = threading.Lock()

    def next(self) -> UnitChunk | None:
        """The next message; None at the end, and after close."""
        with self._lock:
            return next(self._chunks, None)

    def close(self) -> None:
        """Stop cutting; the model is not read afterwards."""
        with self._lock:
            self._chunks.close()
            self._units.close()


def unit_chunks(units: Iterator[tuple[int, memoryview]]) -> Generator[UnitChunk]:
    """Cut units into messages of at most 64 KiB, each with its checksum."""
    for number, content in units:
        for offset in range(0, len(content), CHUNK_BYTES):
            raw = bytes(content[offset : offset + CHUNK_BYTES])
            yield UnitChunk(unit=number, offset=offset, crc32=zlib.crc32(raw), data=raw)


def split_model(
    maker: SliceMaker,
    partition: Partition,
    stores: list[SliceStore],
    known: SliceStore,
    progress: ProgressCallback,
) -> list[StoredSlice]:
    """Write every rank's slice, rank ``r`` into ``stores[r]``; see :func:`write_slice`.

    Their content is recorded in ``known`` and in rank 0's store, so that a master with one of them
    recognises the copies.
    """
    slices = []
    for rank, store in enumerate(stores):
        slices.append(write_slice(maker, partition, rank, store, progress))
        for master in (known, stores[0]):
            master.remember(slices[-1].manifest)
    return slices


class Pace:
    """Bounds what all uploads send together; they take turns, a chunk each."""

    def __init__(self, bytes_per_s: int | None):
        """``bytes_per_s`` is None for no bound."""
        self._bytes_per_s = bytes_per_s
        self._next_s = 0.0  # when the next chunk is due

    async def wait(self, nbytes: int) -> None:
        """Wait until a chunk of so many bytes is due."""
        if self._bytes_per_s is None:
            return
        now_s = asyncio.get_running_loop().time()
        due_s = max(self._next_s, now_s)
        self._next_s = due_s + nbytes / self._bytes_per_s
        await asyncio.sleep(due_s - now_s)


async def distribute(
    makers: Sequence[SliceMaker],
    partition: Partition,
    store: SliceStore,
    clients: Sequence[PeerClient],
    timeout_s: float,
    progress: ProgressCallback,
    pace: Pace,
) -> tuple[list[Manifest], int]:
    """Provide every rank with its slice: rank 0 in ``store``, workers in their own stores.

    ``makers[r]`` makes rank ``r``'s slice in the format of its CPU. Workers on several hosts are
    served at once; those on one host in turn, as their writes would compete for its disk. A
    cancelled call stops reading before it raises; whole blocks of slices are kept for the next.

    Returns:
        The manifest of every rank's slice, by rank, and the bytes of weights that were sent.

    Raises:
        CheckpointError, StoreError, PeerLostError: a slice could not be made or kept; sending the
            others has ended.
    """
    await _stoppable(makers[0].checkpoint.hash_content, progress=progress)
    own = await _stoppable(write_slice, makers[0], partition, 0, store, progress=progress)
    held = await in_thread(own.hold)  # others may write to this store meanwhile
    hosts: dict[str, list[int]] = {}
    for rank, client in enumerate(clients, start=1):
        hosts.setdefault(client.address.rpartition(":")[0], []).append(rank)
    some = asyncio.Semaphore(_MOST_HOSTS)

    async def provide(ranks: Sequence[int]) -> int:
        sent = 0
        for rank in ranks:
            async with some:
                client = clients[rank - 1]
                sent += await _provide(
                    makers[rank], partition, rank, store, client, progress, timeout_s, pace
                )
        return sent

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(provide(ranks)) for ranks in hosts.values()]
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0] from None
    finally:
        held.release()
    manifests = [
        maker.manifest(shard) for maker, shard in zip(makers, partition.shards, strict=True)
    ]
    return manifests, sum(task.result() for task in tasks)


async def _provide(
    maker: SliceMaker,
    partition: Partition,
    rank: int,
    store: SliceStore,
    client: PeerClient,
    progress: ProgressCallback,
    timeout_s: float,
    pace: Pace,
) -> int:
    """Have a worker keep its slice; returns the bytes that were sent. Raises as `distribute`."""
    try:
        manifest = await in_thread(_known_manifest, maker, partition.shards[rank], store)
        if manifest is not None and await _holds(client, manifest, timeout_s):
            await in_thread(maker.made, manifest, store)
            return 0
        return await send_slice(maker, partition, rank, store, client, progress, timeout_s, pace)
    except PeerLostError as exc:
        exc.rank = rank
        raise


def _known_manifest(maker: SliceMaker, shard: Shard, store: SliceStore) -> Manifest | None:
    """The manifest of a slice, if this machine knows all its units."""
    digests = store.known(maker.spec(shard))
    return None if NO_DIGEST in digests else Manifest.of(maker.spec(shard), digests)


async def _stoppable(function: Callable[..., _T], *args: object, progress: ProgressCallback) -> _T:
    """Run ``function(*args, progress)`` in a thread; if cancelled, wait for its end first."""
    cancelled = threading.Event()

    def report(step: Progress) -> None:
        if cancelled.is_set():
            raise StepAborted
        progress(step)

    return await in_thread(function, *args, report, on_cancel=cancelled.set)
