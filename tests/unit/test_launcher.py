"""How long local workers may take to start."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys

import pytest

from tpirt.cluster import launcher
from tpirt.errors import PeerUnreachableError


async def address_of(code: str) -> str:
    """Wait for the address that a process prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-S", "-c", code), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(20):
            return await launcher._address(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_slow_start_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_STANDSTILL_S", 0.05)
    used = itertools.count()
    monkeypatch.setattr(launcher, "_processor_s", lambda _: next(used))
    slow = "import time; time.sleep(0.3); print('listening on a:1 (store s)')"
    assert await address_of(slow) == "a:1"


def test_processor_time_is_that_of_the_process() -> None:
    before = launcher._processor_s(os.getpid())
    assert before > 0
    assert launcher._processor_s(os.getpid()) >= before
    assert launcher._processor_s(2**22 + 1) == 0  # beyond the largest


async def test_a_start_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_STANDSTILL_S", 0.3)
    with pytest.raises(PeerUnreachableError, match=r"has done nothing for 0\.3 s"):
        await address_of("import time; time.sleep(60)")


async def test_a_start_that_ends_is_told() -> None:
    with pytest.raises(PeerUnreachableError, match="ended at its start with exit code 5"):
        await address_of("print('nonsense'); raise SystemExit(5)")
