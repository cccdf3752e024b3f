"""Work that must run to its end even if its caller is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def finish(work: Awaitable[_T], on_cancel: Callable[[], None] | None = None) -> _T:
    """Await a coroutine, as a task of its own, or a future; cancelled, still wait for its end.

    The cancellation is raised after that, in place of any result or error. Further cancellations
    meanwhile change nothing, so ``work`` must end by itself before long.

    Args:
        work: what is to be done.
        on_cancel: called when the caller is cancelled, to have ``work`` end sooner.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # it was looked at: asyncio need not report it
        raise


async def in_thread(
    function: Callable[..., _T], *args: Any, on_cancel: Callable[[], None] | None = None
) -> _T:
    """Run ``function(*args)`` in a thread; when this returns or raises, the thread is done."""
    return await finish(asyncio.to_thread(function, *args), on_cancel)
