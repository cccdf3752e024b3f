"""Run work to its end even if the caller is cancelled, or leave it to itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from functools import partial
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


def begin_in_thread(function: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
    """Run ``function(*args)`` in a thread of its own, which nobody has to wait for.

    For what can hang, such as a disk: neither the end of the loop nor that of the process waits.
    Do not cancel the future.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[_T] = loop.create_future()
    ended.add_done_callback(asyncio.Future.exception)  # retrieved, even if nobody waits

    def run() -> None:
        settle: Callable[[], None]
        try:
            settle = partial(ended.set_result, function(*args))
        except Exception as exc:
            settle = partial(ended.set_exception, exc)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, name="tpirt-disk", daemon=True).start()
    return ended
