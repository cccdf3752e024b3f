"""Run work to its end even if the caller is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def finish(work: Awaitable[_T], on_cancel: Callable[[], object] | None = None) -> _T:
    """Await a coroutine, in a task of its own, or a future. If cancelled, wait for its end first.

    The cancellation is then raised in place of any result or error. Further cancellations have no
    effect, so ``work`` must end soon.

    Args:
        work: a coroutine or a future.
        on_cancel: called when the caller is cancelled, to end ``work`` sooner.
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
            task.exception()  # retrieved, so that asyncio does not report it
        raise


async def in_thread(
    function: Callable[..., _T], *args: Any, on_cancel: Callable[[], None] | None = None
) -> _T:
    """Run ``function(*args)`` in a thread, and wait for its end even if cancelled."""
    return await finish(asyncio.to_thread(function, *args), on_cancel)
