"""Uploads of slices into a worker's store.

Any master of the cluster may send one; in the clear, anyone. So uploads are bounded: a few at a
time, with memory for the largest block of each, and an end to those that stand still.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress

from tpirt.cancellation import in_thread
from tpirt.cluster.machine import available_bytes
from tpirt.errors import DamagedLinkError, PeerError, StoreError, TransportError
from tpirt.protocol.messages import UnitChunk, decode_call
from tpirt.refusals import refused_memory
from tpirt.units import format_bytes
from tpirt.weights.layout import file_bytes
from tpirt.weights.manifest import SliceOrder, SliceSpec
from tpirt.weights.store import SliceStore, StoredSlice
from tpirt.weights.writer import SliceWriter

MOST_UPLOADS = 4
PATIENCE_S = 60.0  # for the next 64 KiB: a link of 9 kbit/s brings as much
_PROGRESS_BYTES = 64 << 10
_GIVES_WAY_S = 10.0  # silence after which an upload gives way to another one
_ENDS_WITHIN_S = 10.0  # where its disk does not hang


class Uploads:
    """Takes uploads into one store.

    Args:
        store: where to.
        memory_bytes: the peer's own limit, which bounds the blocks being assembled.
        log: gets a line for every slice that begins and that is kept.
    """

    def __init__(self, store: SliceStore, memory_bytes: int | None, log: Callable[[str], None]):
        self._store = store
        self._memory_bytes = memory_bytes
        self._log = log
        self._running: list[_Upload] = []

    async def receive(self, messages: AsyncIterator[bytes]) -> int:
        """Take one upload to its end; returns the bytes that came.

        Whole blocks of one that failed are kept for the next.

        Raises:
            DamagedLinkError: what came is not what its sender took a checksum of.
            PeerError: as many as are taken at a time are under way.
            TransportError: the sender stands still, or sends something else.
            StoreError: no room on the disk or in memory; not a slice.
            MemoryLimitError: the system refused memory.
        """
        await self._make_place()
        upload = _Upload(messages)
        self._running.append(upload)
        try:
            order = await upload.order()
            upload.key = order.spec.key
            self._take_memory(upload, order.spec)
            with refused_memory("writing a slice"):
                stored = await self._write(upload, order)
        finally:
            self._running.remove(upload)
            upload.ended.set()
        manifest = stored.manifest
        self._log(
            f"received slice {manifest.slice_id} of {manifest.model}: {stored.path} "
            f"({format_bytes(upload.received)} of {format_bytes(manifest.nbytes)} were missing)"
        )
        return upload.received

    async def end_silent(self, key: str) -> None:
        """End an upload of this slice that is silent: what is whole of it is in the store then.

        Somebody asks what is missing of the slice, perhaps its sender, whose connection was cut.
        If the disk hangs, what that upload has is missing as well.
        """
        for upload in list(self._running):
            if upload.key == key and upload.silence_s >= _GIVES_WAY_S:
                await _end(upload)

    async def _write(self, upload: _Upload, order: SliceOrder) -> StoredSlice:
        """Write what comes; each call in a thread ends before the writer is closed."""
        opened: list[SliceWriter] = []
        try:
            await in_thread(
                lambda: opened.append(SliceWriter(self._store, order.spec, order.digests))
            )
            (writer,) = opened
            self._log(await in_thread(self._store.growth, order.spec, writer.new_bytes))
            async with aclosing(upload.chunks()) as chunks:
                async for chunk in chunks:
                    await in_thread(writer.write, chunk.unit, chunk.offset, chunk.data)
            return await in_thread(writer.commit)
        finally:
            for writer in opened:
                await in_thread(writer.close)

    async def _make_place(self) -> None:
        while len(self._running) >= MOST_UPLOADS:  # others may wait for the same place
            stillest = max(self._running, key=lambda upload: upload.silence_s)
            if stillest.silence_s < _GIVES_WAY_S:
                raise PeerError(f"it receives {MOST_UPLOADS} slices already; try again later")
            await _end(stillest)

    def _take_memory(self, upload: _Upload, spec: SliceSpec) -> None:
        """Reserve memory for the largest block, and for its largest unit, which is no larger."""
        upload.memory_bytes = 2 * max(file_bytes(block) for block in spec.blocks)
        taken = sum(each.memory_bytes for each in self._running)
        available = available_bytes()
        if self._memory_bytes is not None:
            available = min(available, self._memory_bytes)
        if taken > available:
            raise StoreError(
                f"the slice needs {format_bytes(upload.memory_bytes)} of memory to be written; "
                f"uploads may take {format_bytes(available)} here"
            )


async def _end(upload: _Upload) -> None:
    """End a silent upload, and wait for that, but not for ever."""
    upload.give_way()
    with suppress(TimeoutError):
        async with asyncio.timeout(_ENDS_WITHIN_S):
            await upload.ended.wait()


class _Upload:
    """One upload's messages, and how long its sender has been silent."""

    def __init__(self, messages: AsyncIterator[bytes]):
        self.received = 0
        self.memory_bytes = 0
        self.key = ""  # of its slice
        self.ended = asyncio.Event()
        self._messages = aiter(messages)
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Timeout | None = None
        self._since_s = self._loop.time()
        self._patience_s = PATIENCE_S
        self._progress = 0

    @property
    def silence_s(self) -> float:
        """Seconds since the sender has been waited for; 0 while its data are written."""
        return 0.0 if self._waiting is None else self._loop.time() - self._since_s

    def give_way(self) -> None:
        """End the upload now: its sender is silent."""
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(self._loop.time())

    async def order(self) -> SliceOrder:
        """Read the order that an upload begins with."""
        data = await self._next()
        first = UnitChunk() if data is None else decode_call(UnitChunk, data, "caller")
        if not first.order:
            raise TransportError("an upload must begin with its order")
        return await in_thread(SliceOrder.from_json, first.order)

    async def chunks(self) -> AsyncGenerator[UnitChunk, None]:
        """Read the chunks; their checksums are right."""
        while (data := await self._next()) is not None:
            chunk = decode_call(UnitChunk, data, "caller")
            if not chunk.data or zlib.crc32(chunk.data) != chunk.crc32:
                raise DamagedLinkError(
                    f"slice unit {chunk.unit} at {chunk.offset}: empty, or checksum mismatch"
                )
            self.received += len(chunk.data)
            yield chunk

    async def _next(self) -> bytes | None:
        """Wait for a message; the time that waiting takes is limited, not that of writing."""
        self._since_s = self._loop.time()
        try:
            async with asyncio.timeout(self._patience_s) as self._waiting:
                data = await anext(self._messages, None)
        except TimeoutError:
            raise TransportError(
                "the upload stands still; start again: whole blocks of it are kept"
            ) from None
        finally:
            self._waiting = None
        if data is not None:
            self._patience_s -= self._loop.time() - self._since_s
            self._progress += len(data)
            if self._progress >= _PROGRESS_BYTES:
                self._progress, self._patience_s = 0, PATIENCE_S
        return data
