"""What `Engine.connect` does with the clients of its caller, and what it loads without any."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tpirt import Engine, EngineOptions, TpirtError
from tpirt.errors import ConfigError, PeerUnreachableError
from tpirt.transport.base import Channel


class Client:
    """A client of a peer that does not answer."""

    peer_id = address = "nowhere"
    certificate = None

    def __init__(self) -> None:
        self.closed = False

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        self.closed = False
        raise PeerUnreachableError("nowhere: no answer")

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        raise AssertionError

    async def open_session(self) -> Channel:
        raise AssertionError

    async def open_link(self) -> Channel:
        raise AssertionError

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    "wrong",
    [
        {"local": 2},
        {"model": "no/such/model"},
        {"trace": "no/such/folder/trace.json"},
        {},  # it does not answer
    ],
    ids=str,
)
async def test_clients_are_closed_whatever_fails(tmp_path: Path, wrong: Any) -> None:
    client = Client()
    wrong = dict(wrong)
    options = EngineOptions(store=tmp_path, trace=wrong.pop("trace", None))
    with pytest.raises(TpirtError):
        async with Engine.connect(options=options, peers=[client], **wrong):
            raise AssertionError
    assert client.closed


@pytest.mark.parametrize(
    ("peers", "spares", "error"),
    [
        (["h", "h"], [], "'h:50051': listed twice"),
        (["h", "h:50051"], [], "'h:50051': listed twice"),
        (["h"], ["s:1", "s:1"], "'s:1': listed twice"),
        (["h"], ["h:50051"], "spare h:50051: is one of the peers"),
        ([Client(), Client()], [], "'nowhere': listed twice"),
    ],
)
async def test_a_peer_that_is_listed_twice_is_refused(
    peers: list[Any], spares: list[str], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        async with Engine.connect(peers=peers, spares=spares):
            raise AssertionError


ALONE = """
import asyncio, sys
import tpirt.chat, tpirt.cli.generate
from tpirt import Engine, EngineOptions, SamplingParams

async def main():
    async with Engine.connect(options=EngineOptions(store=sys.argv[1], threads=1)) as engine:
        await engine.complete("Hello", SamplingParams(max_tokens=2))

asyncio.run(main())
assert "grpc" not in sys.modules
"""


def test_a_single_rank_does_not_load_grpc(tmp_path: Path) -> None:
    """It would take 8 MiB of the limit that is meant for weights."""
    subprocess.run([sys.executable, "-W", "error", "-c", ALONE, tmp_path], check=True, timeout=60)
