"""One suite over every channel, under both event loops: what the protocol may rely on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvloop

from tpirt.errors import PeerLostError, TpirtError, TransportError
from tpirt.testing import ranks
from tpirt.testing.ranks import Pair, in_memory, over_sockets
from tpirt.transport import grpc
from tpirt.transport.base import Channel
from tpirt.transport.frame import Frame, Kind
from tpirt.transport.grpc import GrpcPeerClient
from tpirt.transport.tickets import TcpListener

TIMEOUT_S = 20.0
LARGE = 8 << 20
LOOPS = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    def run_in_loop(scenario: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(asyncio.wait_for(scenario, TIMEOUT_S))

    return run_in_loop


class Inbox:
    """A receiver that keeps what comes."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.lost: list[TpirtError] = []
        self._changed = asyncio.Event()

    def on_frame(self, frame: Frame) -> None:
        self.frames.append(frame)
        self._changed.set()

    def on_lost(self, exc: TpirtError) -> None:
        self.lost.append(exc)
        self._changed.set()

    async def count(self, number: int) -> list[Frame]:
        await self._until(lambda: len(self.frames) >= number)
        return self.frames

    async def end(self) -> TpirtError:
        await self._until(lambda: bool(self.lost))
        return self.lost[0]

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


PAIRS: dict[str, Pair] = {
    "memory": partial(in_memory, 64 << 10),
    "grpc": partial(over_sockets, "grpc"),
    "tcp": partial(over_sockets, "tcp"),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


@asynccontextmanager
async def started(pair: Pair) -> AsyncIterator[tuple[Channel, Channel, Inbox, Inbox]]:
    """Both ends, reading, with no limit that matters, and what they receive."""
    async with pair() as (mine, theirs):
        inboxes = Inbox(), Inbox()
        for channel, inbox in zip((mine, theirs), inboxes, strict=True):
            channel.frame_limit = 64 << 20
            channel.start(inbox)
        yield mine, theirs, *inboxes


def numbered(number: int, payload: bytes = b"", message: bytes = b"") -> Frame:
    return Frame.of(Kind.MESSAGE, message, payload, seq=number)


async def has_begun(channel: Channel) -> None:
    while not channel.bytes_sent:  # noqa: ASYNC110
        await asyncio.sleep(0)


def numbers(frames: list[Frame]) -> list[int]:
    return [frame.header.seq for frame in frames]


def pattern(size: int, seed: int = 0) -> bytes:
    return bytes((at + seed) % 251 for at in range(10_000)) * (size // 10_000 + 1)


# -- frames ------------------------------------------------------------------------------------


def test_a_thousand_small_frames_both_ways(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with started(pair) as (mine, theirs, my_inbox, their_inbox):

            async def send_all(channel: Channel) -> None:
                for number in range(1000):
                    await channel.send(numbered(number, bytes(number), b"m" * (number % 70)))

            await asyncio.gather(send_all(mine), send_all(theirs))
            for inbox in (my_inbox, their_inbox):
                frames = await inbox.count(1000)
                assert numbers(frames) == list(range(1000))
                assert [len(frame.payload) for frame in frames] == list(range(1000))
                assert all(frame.message == b"m" * (n % 70) for n, frame in enumerate(frames))

    run(scenario())


def test_both_sides_may_send_more_than_the_way_holds(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with started(pair) as (mine, theirs, my_inbox, their_inbox):
            data = pattern(LARGE)
            await asyncio.gather(*(channel.send(numbered(1, data)) for channel in (mine, theirs)))
            for inbox in (my_inbox, their_inbox):
                payload = (await inbox.count(1))[0].payload
                assert payload == data
                assert isinstance(payload, memoryview)
                assert not payload.readonly

    run(scenario())


def test_several_tasks_send_frames_that_do_not_interleave(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with started(pair) as (mine, _, _, inbox):
            data = [pattern(1 << 20, seed) for seed in range(4)]
            await asyncio.gather(*(mine.send(numbered(n, data[n])) for n in range(4)))
            frames = await inbox.count(4)
            assert numbers(frames) == [0, 1, 2, 3]
            assert all(frame.payload == data[n] for n, frame in enumerate(frames))

    run(scenario())


def test_a_cancelled_send_leaves_a_whole_frame_and_a_usable_channel(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with pair() as (mine, theirs):
            memory = bytearray(pattern(LARGE))
            sent = bytes(memory)
            sending = [
                asyncio.create_task(mine.send(numbered(n, memoryview(memory)))) for n in range(2)
            ]
            await has_begun(mine)
            for task in sending:  # one in the middle, one that has not begun
                assert not task.done()
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
            assert all(task.cancelled() for task in sending)
            memory[:] = bytes(len(memory))  # it belongs to the sender again
            again = asyncio.create_task(mine.send(numbered(2, b"after")))
            inbox = Inbox()
            theirs.frame_limit = 64 << 20
            theirs.start(inbox)
            frames = await inbox.count(3)
            await again
            assert numbers(frames) == [0, 1, 2]
            assert frames[0].payload == frames[1].payload == sent
            assert frames[2].payload == b"after"

    run(scenario())


def test_sent_memory_may_be_reused_at_once(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with started(pair) as (mine, _, _, inbox):
            memory = bytearray(b"x" * 100_000)
            await mine.send(numbered(1, memoryview(memory)))
            memory[:] = bytes(len(memory))
            assert (await inbox.count(1))[0].payload == b"x" * 100_000

    run(scenario())


def test_frames_that_come_before_the_start_are_delivered_in_order(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with pair() as (mine, theirs):
            for number in range(10):
                await mine.send(numbered(number))
            inbox = Inbox()
            theirs.poll()  # without a receiver: nothing
            theirs.start(inbox)
            for number in range(10, 20):
                await mine.send(numbered(number))
                theirs.poll()
            assert numbers(await inbox.count(20)) == list(range(20))

    run(scenario())


@pytest.mark.parametrize("kind", ["memory", "tcp"])
def test_poll_delivers_what_is_there_and_keeps_the_order(run: Run, kind: str) -> None:
    class Polling(Inbox):
        """Polls from within, too."""

        def on_frame(self, frame: Frame) -> None:
            super().on_frame(frame)
            channel.poll()

    async def scenario() -> None:
        nonlocal channel
        async with PAIRS[kind]() as (mine, channel):
            inbox = Polling()
            channel.start(inbox)
            for number in range(100):
                await mine.send(numbered(number, bytes(700)))
            channel.poll()  # what loopback and the pipe hold is there without waiting
            polled = len(inbox.frames)
            assert polled
            for number in range(100, 200):
                await mine.send(numbered(number, bytes(700)))
            assert numbers(await inbox.count(200)) == list(range(200))

    channel: Channel
    run(scenario())


def test_heartbeats_are_sent_unless_frames_wait(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with pair() as (mine, theirs):
            sending = asyncio.create_task(mine.send(numbered(1, bytes(LARGE))))
            await has_begun(mine)
            assert not mine.send_nowait(numbered(99))
            inbox = Inbox()
            theirs.frame_limit = 64 << 20
            theirs.start(inbox)
            await sending
            assert mine.send_nowait(numbered(2))
            assert numbers(await inbox.count(2)) == [1, 2]
            await mine.aclose()
            assert not mine.send_nowait(numbered(3))

    run(scenario())


def test_counters_move_while_a_large_frame_is_under_way(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with started(pair) as (mine, theirs, _, inbox):
            sent, received = set(), set()
            sending = asyncio.create_task(mine.send(frame := numbered(1, bytes(4 * LARGE))))
            while not inbox.frames:
                await asyncio.sleep(0)
                sent.add(mine.bytes_sent)
                received.add(theirs.bytes_received)
            await sending
            assert len(sent) > 3
            assert len(received) > 3
            assert mine.bytes_sent == theirs.bytes_received == frame.nbytes

    run(scenario())


# -- the end -----------------------------------------------------------------------------------


def test_leaving_is_seen_after_what_was_sent_before_it(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with started(pair) as (mine, theirs, my_inbox, inbox):
            await mine.send(numbered(1))
            await inbox.count(1)
            await mine.aclose()
            await mine.aclose()
            error = await inbox.end()
            assert isinstance(error, PeerLostError)
            assert theirs.peer_id in str(error)
            for channel in (mine, theirs):
                with pytest.raises(PeerLostError):
                    await channel.send(numbered(2))
            await asyncio.sleep(0.05)
            assert len(inbox.lost) == 1
            assert not my_inbox.lost  # it closed the channel itself

    run(scenario())


def test_a_channel_that_is_closed_before_its_start_says_so(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with pair() as (mine, _):
            await mine.aclose()
            mine.start(inbox := Inbox())
            assert isinstance(await inbox.end(), PeerLostError)

    run(scenario())


def test_closing_ends_sends_under_way(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with pair() as (mine, _):
            sending = [
                asyncio.create_task(mine.send(numbered(n, bytes(4 * LARGE)))) for n in range(3)
            ]
            await has_begun(mine)
            await mine.aclose()
            for task in sending:
                with pytest.raises(PeerLostError, match="closed"):
                    await task

    run(scenario())


def test_the_others_leaving_ends_sends_under_way(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with pair() as (mine, theirs):
            theirs.start(Inbox())
            sending = [
                asyncio.create_task(theirs.send(numbered(n, bytes(8 * LARGE)))) for n in range(2)
            ]
            await has_begun(theirs)
            await mine.aclose()
            for task in sending:
                with pytest.raises(PeerLostError):
                    await task

    run(scenario())


def test_a_receiver_may_close_the_channel_from_within(run: Run, pair: Pair) -> None:
    class Closing(Inbox):
        def on_frame(self, frame: Frame) -> None:
            super().on_frame(frame)
            if len(self.frames) == 1:
                closing.append(asyncio.ensure_future(theirs.aclose()))

    async def scenario() -> None:
        nonlocal theirs
        async with pair() as (mine, theirs):
            inbox = Closing()
            theirs.start(inbox)
            await mine.send(numbered(1))
            await inbox.count(1)
            await closing[0]
            count = len(inbox.frames)
            for number in range(2, 5):
                try:
                    await mine.send(numbered(number))
                except PeerLostError:
                    break
            await asyncio.sleep(0.05)
            assert len(inbox.frames) == count
            assert not inbox.lost

    theirs: Channel
    closing: list[asyncio.Future[None]] = []
    run(scenario())


def test_a_frame_above_the_limit_is_refused_before_it_has_memory(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with pair() as (mine, theirs):
            inbox = Inbox()
            theirs.start(inbox)
            await mine.send(numbered(1, bytes(65_536)))
            await inbox.count(1)
            # The header alone: a peer that claims a tebibyte.
            claim = Frame.of(Kind.MESSAGE)
            claim.head = claim.header._replace(payload_bytes=1 << 40).pack()
            await mine.send(claim)
            error = await inbox.end()
            assert isinstance(error, TransportError)
            assert str(error) == (
                f"peer {theirs.peer_id}: a frame of {1 << 40} bytes, at most 65536 expected here"
            )

    run(scenario())


def test_garbage_is_refused_after_what_came_before_it(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        async with pair() as (mine, theirs):
            inbox = Inbox()
            await mine.send(numbered(1))
            garbage = Frame.of(Kind.MESSAGE)
            garbage.head = b"GET / HTTP/1.1\r\n".ljust(64)
            await mine.send(garbage)
            theirs.start(inbox)
            error = await inbox.end()
            assert numbers(inbox.frames) == [1]
            assert isinstance(error, TransportError)
            assert f"peer {theirs.peer_id}: expected a frame" in str(error)

    run(scenario())


@pytest.mark.parametrize("mistake", [TransportError("out of turn"), ZeroDivisionError("a bug")])
def test_a_receiver_that_raises_loses_the_channel(run: Run, pair: Pair, mistake: Exception) -> None:
    class Raising(Inbox):
        def on_frame(self, frame: Frame) -> None:
            super().on_frame(frame)
            raise mistake

    async def scenario() -> None:
        reported: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        async with pair() as (mine, theirs):
            inbox = Raising()
            theirs.start(inbox)
            for number in range(3):
                await mine.send(numbered(number))
            error = await inbox.end()
            assert isinstance(error, TransportError)
            assert str(mistake) in str(error)
            assert len(inbox.frames) == len(inbox.lost) == 1
        bug = not isinstance(mistake, TpirtError)
        ours = [context for context in reported if theirs.peer_id in context["message"]]
        assert [context["exception"] for context in ours] == [mistake] * bug

    run(scenario())


CHILD = """
import asyncio, sys
from tpirt.transport.grpc import GrpcPeerServer
from tpirt.transport.tickets import TcpListener

if sys.argv[1] == "grpc":
    TcpListener.beside = lambda *_: None

class Service:
    def on_frame(self, frame): self.channel.send_nowait(frame)
    def on_lost(self, exc): pass
    async def session(self, channel):
        self.channel = channel
        channel.start(self)
        await asyncio.Event().wait()

async def main():
    print(await GrpcPeerServer(Service()).start("127.0.0.1", 0), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["grpc", "tcp"])
def test_a_killed_peer_is_noticed_at_once_and_told_once(run: Run, kind: str) -> None:
    async def scenario() -> None:
        assert child.stdout is not None
        client = GrpcPeerClient(f"127.0.0.1:{int(child.stdout.readline())}")
        channel = await client.open_session()
        assert channel.carrier.kind == kind
        inbox = Inbox()
        channel.start(inbox)
        await channel.send(numbered(1))
        await inbox.count(1)
        sending = asyncio.create_task(channel.send(numbered(2, bytes(4 * LARGE))))
        await asyncio.sleep(0)
        os.kill(child.pid, signal.SIGKILL)
        error = await asyncio.wait_for(inbox.end(), 2.0)
        assert isinstance(error, PeerLostError)
        with pytest.raises(PeerLostError):
            await sending
        await asyncio.sleep(0.6)
        assert len(inbox.lost) == 1
        await client.aclose()

    with subprocess.Popen(
        [sys.executable, "-c", CHILD, kind], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            run(scenario())
        finally:
            child.kill()


async def test_a_busy_machine_opens_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the carrier that is asked for, however late the offer of a connection comes."""
    monkeypatch.setattr(grpc, "_OFFER_S", 0.05)
    monkeypatch.setattr(ranks, "OPEN_S", 10.0)
    offer = TcpListener.offer

    def late(listener: TcpListener, cipher: str) -> Any:
        time.sleep(0.1)
        return offer(listener, cipher)

    monkeypatch.setattr(TcpListener, "offer", late)
    async with over_sockets("tcp") as (mine, theirs):
        assert mine.carrier.kind == theirs.carrier.kind == "tcp"
