"""A link: the one reader of a channel, its heartbeats, requests, and tensors in their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tpirt.batch import CommDtype
from tpirt.errors import PeerError, PeerLostError, TransportError
from tpirt.protocol.link import Incoming, Link
from tpirt.protocol.messages import Abort, ClockRequest, Failure, Joined, Probe, StepEnded
from tpirt.protocol.tensors import tensor_head
from tpirt.testing.faults import Fault, FaultyChannel
from tpirt.testing.ranks import Inbox
from tpirt.transport.frame import Frame, Kind
from tpirt.transport.memory import memory_pair

SHAPE = (1, 4)


def head(step: int, seq: int, kind: Kind = Kind.PARTIAL) -> bytes:
    return tensor_head(kind, step, seq, CommDtype.FLOAT32, SHAPE)


def tensor(step: int, seq: int, kind: Kind = Kind.PARTIAL, fill: int = 1) -> Frame:
    return Frame(head(step, seq, kind), payload=bytes([fill] * 16))


@asynccontextmanager
async def linked(
    timeout_s: float = 5.0, capacity: int | None = None
) -> AsyncIterator[tuple[Link, Link]]:
    """The master's link to rank 1, and that rank's to the master; both have begun step 1."""
    mine, theirs = memory_pair("worker", "master", capacity)
    async with asyncio.timeout(20), links_over(mine, theirs, timeout_s) as links:
        yield links


@asynccontextmanager
async def links_over(mine, theirs, timeout_s: float) -> AsyncIterator[tuple[Link, Link]]:  # type: ignore[no-untyped-def]
    links = (Link(mine, 1, timeout_s, Inbox()), Link(theirs, 0, timeout_s, Inbox()))
    for link in links:
        link.start()
        link.begin(1, 2)
    try:
        yield links
    finally:
        for link in links:
            await link.aclose()


def inbox(link: Link) -> Inbox:
    handler = link._handler
    assert isinstance(handler, Inbox)
    return handler


async def arrive(link: Link, *frames: Frame) -> None:
    """Send frames over the link's other end, and let them arrive."""
    for frame in frames:
        await link.send(frame)
    await link.request(Probe())  # answered after everything before it was read


# -- tensors -----------------------------------------------------------------------------------


async def test_tensors_wait_for_their_reader_in_order() -> None:
    async with linked() as (master, worker):
        await arrive(worker, tensor(1, 0, fill=3), tensor(1, 1, fill=4), tensor(1, 2, fill=5))
        assert bytes(await master.expect(1, head(1, 1)))[0] == 4
        assert bytes(await master.expect(0, head(1, 0)))[0] == 3
        assert bytes(await master.expect(0, head(1, 2)))[0] == 5


async def test_a_tensor_of_the_next_step_is_kept_until_it_begins() -> None:
    async with linked() as (master, worker):
        await arrive(worker, tensor(2, 0))
        master.end(completed=True)
        master.begin(2, 1)
        assert await master.expect(0, head(2, 0))


async def test_tensors_of_a_given_up_step_are_dropped_whenever_they_come() -> None:
    async with linked() as (master, worker):
        await arrive(worker, tensor(1, 0))
        master.end(completed=False)
        await arrive(worker, tensor(1, 2))
        master.begin(2, 1)
        await arrive(worker, tensor(1, 4), tensor(2, 0, fill=9))
        assert bytes(await master.expect(0, head(2, 0)))[0] == 9
        assert master.lost is None


async def test_a_skipped_step_counts_as_given_up() -> None:
    async with linked() as (master, worker):
        master.end(completed=True)
        await arrive(worker, tensor(2, 0))  # of a step that never came here
        master.skip(2)
        await arrive(worker, tensor(2, 2))
        master.begin(3, 1)
        await arrive(worker, tensor(3, 0, fill=7))
        assert bytes(await master.expect(0, head(3, 0)))[0] == 7


@pytest.mark.parametrize(
    "frames",
    [
        [tensor(1, 0), tensor(1, 0)],  # twice
        [tensor(1, 2), tensor(1, 0)],  # out of order
        [tensor(3, 0)],  # two steps ahead
        [tensor(2, n) for n in (0, 2, 4, 6, 8)],  # far ahead
        [Frame.of(77)],  # an unknown kind
        [Frame.of(Kind.MESSAGE, b"\xff\xff")],  # not protobuf
        [Frame.of(Kind.MESSAGE)],  # empty
        [Frame.of(Kind.REPLY, b"", seq=9)],  # to nothing
    ],
    ids=["twice", "order", "later", "ahead", "kind", "garbage", "empty", "reply"],
)
async def test_what_fits_nothing_breaks_the_link_and_names_the_peer(frames: list[Frame]) -> None:
    async with linked() as (master, worker):
        for frame in frames:
            await worker.send(frame)
        with pytest.raises(TransportError, match="peer worker") as caught:
            await master.expect(1, head(1, 1))
        assert await inbox(master).lost is caught.value is master.lost


async def test_another_tensor_than_the_expected_one_is_refused() -> None:
    async with linked() as (master, worker):
        waiting = asyncio.create_task(master.expect(0, head(1, 0)))
        await asyncio.sleep(0)
        await worker.send(tensor(1, 0, Kind.REDUCED))
        with pytest.raises(TransportError, match="expected a partial of step 1"):
            await waiting


async def test_a_cancelled_reader_leaves_the_tensor_to_the_next() -> None:
    async with linked() as (master, worker):
        for turns in range(6):  # before the tensor comes, with it, after it
            seq = 2 * turns
            waiting = asyncio.create_task(master.expect(0, head(1, seq)))
            await asyncio.sleep(0)
            await worker.send(tensor(1, seq, fill=turns))
            for _ in range(turns):
                await asyncio.sleep(0)
            if waiting.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert bytes(await master.expect(0, head(1, seq)))[0] == turns
            else:
                assert bytes(await waiting)[0] == turns


async def test_a_woken_step_gives_nobody_a_tensor_any_more() -> None:
    async with linked() as (master, worker):
        waiting = asyncio.create_task(master.expect(0, head(1, 0)))
        await asyncio.sleep(0)
        reason = TransportError("given up")
        master.wake(reason)
        with pytest.raises(TransportError, match="given up"):
            await waiting
        with pytest.raises(TransportError, match="given up"):
            await master.expect(1, head(1, 1))
        master.end(completed=False)
        master.begin(2, 1)
        await worker.send(tensor(2, 0))
        assert await master.expect(0, head(2, 0))


async def test_news_of_an_abort_that_a_reader_polls_itself_wakes_it() -> None:
    """It comes before anyone waits: a caller about to wait must not hang."""

    class Aborting(Inbox):
        def on_message(self, link: Link, incoming: Incoming) -> None:
            link.wake(TransportError("given up"))

    mine, theirs = memory_pair("worker", "master")
    master, worker = Link(mine, 1, 5, Inbox()), Link(theirs, 0, 5, Aborting())
    master.start()
    worker.start()
    await master.request(Probe())
    worker.begin(1, 1)
    await master.notify(Abort(1))  # in the pipe, not read yet
    with pytest.raises(TransportError, match="given up"):
        await asyncio.wait_for(worker.expect(0, head(1, 0)), 5)
    await master.aclose()
    await worker.aclose()


# -- requests ----------------------------------------------------------------------------------


async def test_many_requests_at_once_are_answered_in_any_order() -> None:
    async with linked() as (master, worker):
        asked = [asyncio.create_task(master.request(Abort(n))) for n in range(20)]
        got = [await inbox(worker).messages.get() for _ in asked]
        for incoming in reversed(got):
            worker.reply(incoming, StepEnded(incoming.body.step))
        assert [(await task).body.step for task in asked] == list(range(20))


async def test_a_cancelled_request_ignores_its_answer() -> None:
    async with linked() as (master, worker):
        asked = asyncio.create_task(master.request(ClockRequest()))
        incoming = await inbox(worker).messages.get()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        worker.reply(incoming, Joined())
        await arrive(worker)
        assert master.lost is None


async def test_a_failure_in_answer_is_raised_as_what_it_was() -> None:
    async with linked() as (master, worker):
        asked = asyncio.create_task(master.request(ClockRequest()))
        incoming = await inbox(worker).messages.get()
        worker.reply(incoming, Failure.of(PeerError("no clock")))
        with pytest.raises(PeerError, match="peer worker: no clock"):
            await asked


async def test_requests_end_with_the_link() -> None:
    async with linked() as (master, worker):
        asked = [asyncio.create_task(master.request(ClockRequest())) for _ in range(3)]
        waiting = asyncio.create_task(master.expect(0, head(1, 0)))
        await inbox(worker).messages.get()
        await worker.aclose()
        for task in [*asked, waiting]:
            with pytest.raises(PeerLostError) as caught:
                await task
            assert (caught.value.rank, caught.value.peer_id) == (1, "worker")
        with pytest.raises(PeerLostError):
            await master.request(ClockRequest())
        with pytest.raises(PeerLostError):
            await master.expect(0, head(1, 0))


async def test_a_closed_link_raises_at_once() -> None:
    async with linked() as (master, _):
        asked = asyncio.create_task(master.request(ClockRequest()))
        await asyncio.sleep(0)
        await master.aclose()
        await master.aclose()
        for call in (asked, master.expect(0, head(1, 0)), master.notify(Joined())):
            with pytest.raises(PeerLostError, match="closed"):
                await call
        assert not inbox(master).lost.done()  # its owner knows


# -- life --------------------------------------------------------------------------------------


async def test_heartbeats_keep_an_idle_link_alive() -> None:
    async with linked(timeout_s=0.4) as (master, worker):
        await asyncio.sleep(1.5)
        assert master.lost is None
        assert worker.lost is None
        await master.request(Probe())


async def test_a_shorter_timeout_hastens_the_heartbeats() -> None:
    async with linked(timeout_s=60) as (master, worker):
        await asyncio.sleep(0.2)
        for link in (master, worker):
            link.silence(0.4)
        await asyncio.sleep(1.5)
        assert master.lost is None
        assert worker.lost is None


async def test_a_silent_peer_is_lost_after_the_timeout() -> None:
    mine, theirs = memory_pair("worker", "master")
    silent = FaultyChannel(theirs, Fault.SILENCE)
    async with links_over(mine, silent, 0.4) as (master, worker):
        worker.tell(Joined())  # swallowed, as is everything after it
        began = asyncio.get_running_loop().time()
        with pytest.raises(PeerLostError, match=r"said nothing for 0\.4 s") as caught:
            await asyncio.wait_for(master.expect(0, head(1, 0)), 10)
        assert caught.value.rank == 1
        assert asyncio.get_running_loop().time() - began > 0.3


@pytest.mark.parametrize("clock", ["loop", "wall"])
async def test_after_a_pause_longer_than_the_timeout_a_silent_peer_is_lost_soon(
    clock: str,
) -> None:
    """The process was stopped, or the machine slept: the other side may have given this one up."""
    mine, theirs = memory_pair("worker", "master")
    silent = FaultyChannel(theirs, Fault.SILENCE)
    async with links_over(mine, silent, 20.0) as (master, worker), linked(20.0) as alive:
        worker.tell(Joined())  # swallowed, as is everything after it
        for link in (master, *alive):
            link._interval_s = 0.1
            link._schedule()
        for link in (master, alive[0]):
            if clock == "loop":
                link._ticked_s -= 100
            else:
                link._ticked_wall_s -= 100
        async with asyncio.timeout(5):
            with pytest.raises(PeerLostError, match="said nothing for 20 s"):
                await master.expect(0, head(1, 0))
        assert alive[0].lost is None


async def test_after_a_shorter_pause_the_other_side_has_all_its_time() -> None:
    mine, theirs = memory_pair("worker", "master")
    silent = FaultyChannel(theirs, Fault.SILENCE)
    async with links_over(mine, silent, 1.0) as (master, worker):
        worker.tell(Joined())
        master._heard_s -= 0.9
        master._ticked_s -= 0.9
        await asyncio.sleep(0.7)
        assert master.lost is None


async def test_a_frame_that_takes_longer_than_the_timeout_arrives() -> None:
    """Bytes that come count, not whole frames: slow is not silent."""
    mine, theirs = memory_pair("worker", "master", capacity=2048)
    async with links_over(mine, theirs, 0.5) as (master, worker):
        master.channel.frame_limit = 1 << 20
        poll = mine.poll
        reading = True

        async def slowly() -> None:
            while reading:
                poll()
                await asyncio.sleep(0.02)

        mine._in.on_readable = None
        mine.poll = lambda: None  # type: ignore[method-assign]
        reader = asyncio.create_task(slowly())
        payload = bytes(128 << 10)  # 64 portions: more than a second
        began = asyncio.get_running_loop().time()
        await worker.notify(Joined(), payload)
        got = await inbox(master).messages.get()
        assert len(got.frame.payload) == len(payload)
        assert asyncio.get_running_loop().time() - began > 0.6
        assert master.lost is None
        assert worker.lost is None
        reading = False
        await reader


async def test_nothing_is_left_of_a_closed_link() -> None:
    before = asyncio.all_tasks()
    async with linked() as (master, worker):
        master.tell(Joined())
        worker.reply(Incoming(Joined(), Frame.of(Kind.MESSAGE), 1), Joined())
    assert asyncio.all_tasks() - before == set()
