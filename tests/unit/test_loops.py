"""What the tests themselves run on."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import closing
from typing import Any

import pytest

from tests.support.loops import TimelyLoop


def test_a_test_that_hangs_on_uvloop_is_ended() -> None:
    def time_is_up(*_: Any) -> None:
        pytest.fail("time is up")

    async def hang() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(os.kill, os.getpid(), signal.SIGUSR1)
        async with asyncio.timeout(10):
            await loop.create_future()

    before = signal.signal(signal.SIGUSR1, time_is_up)
    try:
        with closing(TimelyLoop()) as loop, pytest.raises(asyncio.CancelledError, match="time is"):
            loop.run_until_complete(hang())
    finally:
        signal.signal(signal.SIGUSR1, before)
