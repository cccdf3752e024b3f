"""A rank's spilled sequences, without waiting for ever for a disk that hangs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from tpirt.cancellation import begin_in_thread, finish
from tpirt.errors import StoreError
from tpirt.model.kv_files import KVFiles
from tpirt.model.kv_store import Cached
from tpirt.weights.store import SliceStore

SPILL_TIMEOUT_S = 60.0  # a sequence that takes longer is computed again sooner


class SpillDisk:
    """Calls :class:`KVFiles` in threads, one at a time.

    A call that takes longer than ``SPILL_TIMEOUT_S`` is left to itself, with the memory that it
    writes from or reads into. Until it ends, all others are refused at once. Calls cannot be
    cancelled.
    """

    def __init__(self, store: SliceStore):
        self._files = KVFiles(store)
        self._path = store.root
        self._last: asyncio.Future[None] | None = None

    def tokens(self, handle: int) -> int:
        """See :meth:`KVFiles.tokens`."""
        return self._files.tokens(handle)

    async def write(self, handle: int, layers: Sequence[Cached]) -> None:
        """See :meth:`KVFiles.write`; raises StoreError also if the disk hangs."""
        await self._call(self._files.write, handle, layers)

    async def read(self, handle: int, layers: Sequence[Cached]) -> None:
        """See :meth:`KVFiles.read`; raises StoreError also if the disk hangs."""
        await self._call(self._files.read, handle, layers)

    async def drop(self, handles: Sequence[int]) -> None:
        """See :meth:`KVFiles.drop`; while the disk hangs they stay until the session ends."""
        with contextlib.suppress(StoreError):
            await self._call(self._files.drop, handles)

    async def aclose(self) -> None:
        """See :meth:`KVFiles.close`; while the disk hangs, that is left until its call ends."""
        if self._is_busy:
            assert self._last is not None
            self._last.add_done_callback(lambda _: begin_in_thread(self._files.close))
            return
        with contextlib.suppress(StoreError):
            await self._call(self._files.close)

    @property
    def _is_busy(self) -> bool:
        return self._last is not None and not self._last.done()

    async def _call(self, function: Callable[..., None], *args: Any) -> None:
        if self._is_busy:
            raise StoreError(f"{self._path}: its disk hangs; nothing is spilled to it")
        ended = self._last = begin_in_thread(function, *args)
        done, _ = await finish(asyncio.wait({ended}, timeout=SPILL_TIMEOUT_S))
        if not done:
            raise StoreError(
                f"{self._path}: its disk has not answered for {SPILL_TIMEOUT_S:g} s; check it"
            )
        ended.result()
