"""Work that runs to its end, however often its caller is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpirt.cancellation import finish, in_thread

Start = Callable[[Callable[[], None]], Awaitable[None]]


def in_executor(function: Callable[[], None]) -> Awaitable[None]:
    pool = ThreadPoolExecutor(1)
    running = asyncio.get_running_loop().run_in_executor(pool, function)
    pool.shutdown(wait=False)
    return finish(running)


@pytest.mark.parametrize("start", [in_thread, in_executor])
async def test_further_cancellations_do_not_leave_a_thread_behind(start: Start) -> None:
    entered, leave, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        assert leave.wait(10)
        ended.set()

    task = asyncio.ensure_future(start(work))
    await asyncio.sleep(0)
    while not entered.is_set():  # noqa: ASYNC110 - set by a thread
        await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_the_work_can_be_told_to_end_sooner() -> None:
    leave = asyncio.Event()
    task = asyncio.ensure_future(finish(leave.wait(), leave.set))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert leave.is_set()
