"""One suite over every channel and every communicator: what ranks may rely on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import torch

from tpirt.batch import Algorithm, Collective, CommDtype
from tpirt.collectives.algorithms import GroupCommunicator
from tpirt.collectives.base import Communicator, SingleRankCommunicator
from tpirt.collectives.comm_dtype import decode, encode
from tpirt.collectives.context import StepAborted
from tpirt.collectives.links import LinkSet
from tpirt.errors import PeerLostError, StoreError, TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.testing.faults import Fault, FaultyChannel
from tpirt.transport.base import Channel
from tpirt.transport.codec import Frame, read_tensor
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.memory import memory_pair
from tpirt.transport.pb import tpirt_pb2 as pb
from tpirt.transport.tcp import TcpListener

TIMEOUT_S = 10.0
Pairs = Callable[[], Any]  # () -> async context manager of (master's end, worker's end)


class Rendezvous:
    """A service that hands its session's channel to the test and keeps the session open."""

    def __init__(self) -> None:
        self.channel: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self.leave = asyncio.Event()

    async def hello(self, request: pb.HelloRequest) -> pb.HelloReply:
        return pb.HelloReply(peer_id=request.slice_id)

    async def put_slice(self, chunks: AsyncIterator[pb.SliceChunk]) -> pb.PutSliceReply:
        total = 0
        async for message in chunks:
            total += len(message.chunk.data)
        if total == 13:
            raise StoreError("no room for 13 bytes")
        return pb.PutSliceReply(bytes_written=total)

    async def session(self, channel: Channel) -> None:
        self.channel.set_result(channel)
        await self.leave.wait()


@asynccontextmanager
async def served_pair(via: str) -> AsyncIterator[tuple[Channel, Channel]]:
    service = Rendezvous()
    server = GrpcPeerServer(service)
    port = await server.start("127.0.0.1", 0)
    client = GrpcPeerClient(f"127.0.0.1:{port}")
    try:
        mine = await client.open_session()
        async with asyncio.timeout(TIMEOUT_S):
            theirs = await service.channel
            assert mine.via == theirs.via == via
            yield mine, theirs
    finally:
        service.leave.set()
        await client.aclose()
        await server.aclose()


@asynccontextmanager
async def grpc_pair() -> AsyncIterator[tuple[Channel, Channel]]:
    """Where there is no port for a connection beside the call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TcpListener, "beside", lambda *_: None)
        async with served_pair("grpc") as pair:
            yield pair


@asynccontextmanager
async def in_memory_pair() -> AsyncIterator[tuple[Channel, Channel]]:
    mine, theirs = memory_pair("worker", "master")
    async with asyncio.timeout(TIMEOUT_S):
        yield mine, theirs
    await mine.aclose()
    await theirs.aclose()


@asynccontextmanager
async def wrapped_pair() -> AsyncIterator[tuple[Channel, Channel]]:
    """The test tool itself: a faulty channel whose fault is still to come."""
    async with in_memory_pair() as (mine, theirs):
        yield (
            FaultyChannel(mine, Fault.DROP, after=10**9),
            FaultyChannel(theirs, Fault.SILENCE, kind="empty"),
        )


ALGORITHMS = pytest.mark.parametrize("algorithm", Algorithm, ids=lambda algorithm: algorithm.value)

PAIRS = {
    "memory": in_memory_pair,
    "grpc": grpc_pair,
    "tcp": partial(served_pair, "tcp"),
    "faulty": wrapped_pair,
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pairs:
    return PAIRS[request.param]


def numbered(number: int, payload: bytes = b"") -> Frame:
    return Frame(pb.FrameHeader(abort=pb.Abort(step=number)), payload)


# -- channels ----------------------------------------------------------------------------------


async def test_frames_keep_their_order_both_ways_at_once(pair: Pairs) -> None:
    async with pair() as (mine, theirs):

        async def talk(channel: Channel) -> list[int]:
            async def send_all() -> None:
                for number in range(200):
                    await channel.send(numbered(number, bytes(number)))

            async def receive_all() -> list[int]:
                frames = [await channel.recv(TIMEOUT_S) for _ in range(200)]
                assert [len(frame.payload) for frame in frames] == list(range(200))
                return [frame.header.abort.step for frame in frames]

            _, numbers = await asyncio.gather(send_all(), receive_all())
            return numbers

        both = await asyncio.gather(talk(mine), talk(theirs))
        assert both == [list(range(200))] * 2


def float32_header(tensor: torch.Tensor) -> pb.FrameHeader:
    return pb.FrameHeader(partial=pb.Tensor(step=1, dtype=pb.FLOAT32, shape=tensor.shape))


async def test_large_frames_arrive_whole(pair: Pairs) -> None:
    tensor = torch.arange(5 << 20, dtype=torch.float32)  # 20 MiB, beyond gRPC's usual 4
    async with pair() as (mine, theirs):
        for sender, receiver in ((mine, theirs), (theirs, mine)):
            header = float32_header(tensor)
            sending = asyncio.create_task(sender.send(Frame(header, tensor_bytes(tensor))))
            frame = await receiver.recv(TIMEOUT_S)
            await sending
            got = frame.header.partial
            assert torch.equal(read_tensor(frame.payload, got.dtype, tuple(got.shape)), tensor)


async def test_sent_memory_may_be_reused_at_once(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        tensor = torch.ones(1000)
        header = float32_header(tensor)
        await mine.send(Frame(header, tensor_bytes(tensor)))
        tensor.zero_()
        frame = await theirs.recv(TIMEOUT_S)
        assert read_tensor(frame.payload, pb.FLOAT32, (1000,)).eq(1).all()


async def test_leaving_is_seen_after_what_was_sent_before_it(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        await mine.send(numbered(1))
        assert (await theirs.recv(TIMEOUT_S)).header.abort.step == 1
        await mine.aclose()
        for _ in range(2):  # and again: nobody waits for ever on a dead channel
            with pytest.raises(PeerLostError, match=theirs.peer_id.split()[0]):
                await theirs.recv(TIMEOUT_S)


async def test_leaving_wakes_a_waiting_receiver(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        await mine.send(numbered(1))
        await theirs.recv(TIMEOUT_S)
        waiting = asyncio.create_task(theirs.recv(None))
        await asyncio.sleep(0)
        await mine.aclose()
        with pytest.raises(PeerLostError):
            await asyncio.wait_for(waiting, TIMEOUT_S)


async def test_own_side_is_closed_for_use(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        await mine.send(numbered(1))
        await theirs.recv(TIMEOUT_S)
        await mine.aclose()
        await mine.aclose()
        with pytest.raises(PeerLostError):
            await mine.send(numbered(2))
        with pytest.raises(PeerLostError):
            await mine.recv(TIMEOUT_S)


async def test_own_leaving_wakes_a_waiting_receiver(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        await mine.send(numbered(1))
        await theirs.recv(TIMEOUT_S)
        waiting = asyncio.create_task(mine.recv(None))
        await asyncio.sleep(0)
        await mine.aclose()
        with pytest.raises(PeerLostError):
            await asyncio.wait_for(waiting, TIMEOUT_S)


async def test_a_cancelled_receiver_is_cancelled(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        await theirs.send(numbered(1))
        await mine.recv(TIMEOUT_S)
        waiting = asyncio.create_task(mine.recv(None))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with contextlib.suppress(PeerLostError):  # closed by it or not, never cancelled again
            await mine.send(numbered(2))
        with pytest.raises(PeerLostError):
            await mine.recv(0.01)


async def test_silence_ends_at_the_deadline(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        await theirs.send(numbered(1))
        await mine.recv(TIMEOUT_S)
        with pytest.raises(PeerLostError, match=r"said nothing for 0\.05 s"):
            await mine.recv(0.05)
        with pytest.raises(PeerLostError):  # once more: an error, not a cancellation
            await mine.recv(0.05)


async def test_bytes_are_counted_alike_on_both_sides(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        for size in (0, 1, 70_000):
            await mine.send(numbered(3, bytes(size)))
            await theirs.recv(TIMEOUT_S)
        assert mine.bytes_sent == theirs.bytes_received
        assert 70_001 < mine.bytes_sent < 70_100
        assert theirs.bytes_sent == mine.bytes_received == 0
        mine.bytes_sent = 0
        await mine.send(numbered(3))
        assert 0 < mine.bytes_sent < 20


async def test_garbage_is_refused_and_said_to_be_that(pair: Pairs) -> None:
    async with pair() as (mine, theirs):
        await FaultyChannel(mine, Fault.GARBAGE).send(numbered(1))
        frame = await theirs.recv(TIMEOUT_S)
        with pytest.raises(TransportError, match=f"peer {theirs.peer_id}: malformed"):
            _ = frame.kind


# -- what gRPC adds ----------------------------------------------------------------------------


async def test_end_of_session_is_seen_by_the_master() -> None:
    service = Rendezvous()
    server = GrpcPeerServer(service)
    client = GrpcPeerClient(f"127.0.0.1:{await server.start('127.0.0.1', 0)}")
    try:
        mine = await client.open_session()
        await asyncio.wait_for(service.channel, TIMEOUT_S)
        service.leave.set()
        with pytest.raises(PeerLostError):
            await mine.recv(TIMEOUT_S)
    finally:
        await client.aclose()
        await server.aclose()


async def test_uploads_and_their_refusal() -> None:
    server = GrpcPeerServer(Rendezvous())
    client = GrpcPeerClient(f"127.0.0.1:{await server.start('127.0.0.1', 0)}")

    async def chunks(count: int, size: int) -> AsyncIterator[pb.SliceChunk]:
        for _ in range(count):
            yield pb.SliceChunk(chunk=pb.BlockChunk(data=bytes(size)))

    try:
        reply = await client.hello(pb.HelloRequest(slice_id="abc"), TIMEOUT_S)
        assert reply.peer_id == "abc"
        assert (await client.put_slice(chunks(5, 1 << 20))).bytes_written == 5 << 20
        with pytest.raises(StoreError, match="no room for 13 bytes"):
            await client.put_slice(chunks(1, 13))
    finally:
        await client.aclose()
        await server.aclose()


# -- communicators -----------------------------------------------------------------------------


@asynccontextmanager
async def star(
    pair: Pairs, world: int, hook: Callable[[int, Channel], Channel] | None = None
) -> AsyncIterator[tuple[list[Communicator], list[Channel]]]:
    """Ranks linked to the master; also the workers' channels. ``hook`` changes those."""
    async with AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(pair()) for _ in range(world - 1)]
        theirs = [hook(r, e[1]) if hook else e[1] for r, e in enumerate(ends, start=1)]
        members: list[Communicator] = [master_of(*(mine for mine, _ in ends))]
        members += [worker_of(channel, rank, world) for rank, channel in enumerate(theirs, start=1)]
        yield members, theirs


@asynccontextmanager
async def mesh(pair: Pairs, world: int) -> AsyncIterator[list[Communicator]]:
    """Ranks that are all linked to each other."""
    async with AsyncExitStack() as stack:
        channels: list[dict[int, Channel]] = [{} for _ in range(world)]
        for low, high in itertools.combinations(range(world), 2):
            mine, theirs = await stack.enter_async_context(pair())
            channels[low][high], channels[high][low] = mine, theirs
        yield [
            GroupCommunicator(world, LinkSet(rank, own, TIMEOUT_S))
            for rank, own in enumerate(channels)
        ]


def master_of(*channels: Channel) -> GroupCommunicator:
    links = LinkSet(0, dict(enumerate(channels, start=1)), TIMEOUT_S)
    return GroupCommunicator(len(channels) + 1, links)


def worker_of(channel: Channel, rank: int = 1, world: int = 2) -> GroupCommunicator:
    return GroupCommunicator(world, LinkSet(rank, {0: channel}, TIMEOUT_S))


def channel_to(member: Communicator, rank: int) -> Channel:
    assert isinstance(member, GroupCommunicator)
    return member._links._channels[rank]


def partials(world: int, shape: tuple[int, ...] = (3, 5)) -> list[torch.Tensor]:
    # Of very different sizes: any other order of adding gives other bits.
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (rank % 4 * 2)
        for rank in range(world)
    ]


def in_rank_order(values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


async def test_solo_sums_to_itself() -> None:
    comm = SingleRankCommunicator()
    comm.begin(1)
    value = torch.randn(2, 3)
    assert torch.equal(await comm.all_reduce(value.clone()), value)
    assert torch.equal(await comm.reduce(value.clone()), value)


@ALGORITHMS
@pytest.mark.parametrize("world", [2, 3, 4])
async def test_sums_in_rank_order_whatever_the_order_of_arrival(
    pair: Pairs, world: int, algorithm: Algorithm
) -> None:
    values = partials(world)
    expected = in_rank_order(values)
    other_orders = {
        in_rank_order(order).numpy().tobytes() for order in itertools.permutations(values)
    }
    assert world == 2 or len(other_orders) > 1  # else this test would show nothing
    async with mesh(pair, world) as members:
        for step, order in enumerate(itertools.permutations(range(world))):
            for comm in members:
                comm.begin(step, Collective(algorithm))
            tasks = {}
            for rank in order:
                tasks[rank] = asyncio.create_task(members[rank].all_reduce(values[rank].clone()))
                await asyncio.sleep(0)
            sums = [await tasks[rank] for rank in range(world)]
            assert all(torch.equal(total, expected) for total in sums)


@ALGORITHMS
async def test_many_collectives_in_a_step_and_a_last_reduce(
    pair: Pairs, algorithm: Algorithm
) -> None:
    async def rank(comm: Communicator) -> list[torch.Tensor | None]:
        out: list[torch.Tensor | None] = []
        for step in (1, 2):
            comm.begin(step, Collective(algorithm))
            for seq in range(5):
                out.append(await comm.all_reduce(torch.full((2, 2), float(comm.rank + seq))))
            out.append(await comm.reduce(torch.full((1, 2), 1.0)))
        return out

    async with mesh(pair, 3) as members:
        results = await asyncio.gather(*(rank(comm) for comm in members))
    for r, result in enumerate(results):
        for at, total in enumerate(result):
            if at % 6 < 5:
                assert total is not None
                assert total.eq(3.0 * (at % 6) + 3).all()
            elif r == 0:
                assert total is not None
                assert total.eq(3).all()
            else:
                assert total is None


@pytest.mark.parametrize("comm_dtype", CommDtype, ids=lambda comm_dtype: comm_dtype.value)
@pytest.mark.parametrize("world", [2, 3, 5])
async def test_all_ranks_and_algorithms_have_the_same_bits_in_every_form(
    comm_dtype: CommDtype, world: int
) -> None:
    values = partials(world, (3, 130))
    sums: list[torch.Tensor] = []
    async with mesh(in_memory_pair, world) as members:
        for step, algorithm in enumerate(Algorithm, start=1):
            for comm in members:
                comm.begin(step, Collective(algorithm, comm_dtype))
            sums += await asyncio.gather(
                *(comm.all_reduce(values[comm.rank].clone()) for comm in members)
            )
    exact = in_rank_order(values)
    assert all(torch.equal(total, sums[0]) for total in sums)
    if comm_dtype is CommDtype.FLOAT32:
        assert torch.equal(sums[0], exact)
    error = {CommDtype.FLOAT32: 0.0, CommDtype.BFLOAT16: 2**-7, CommDtype.INT8: 2**-5}[comm_dtype]
    assert (sums[0] - exact).norm() <= error * exact.norm()


@ALGORITHMS
async def test_everyone_may_send_more_than_the_way_holds(pair: Pairs, algorithm: Algorithm) -> None:
    async with mesh(pair, 3) as members:

        async def rank(comm: Communicator) -> torch.Tensor:
            comm.begin(1, Collective(algorithm))
            await comm.all_reduce(torch.ones(1, 2))
            return await comm.all_reduce(torch.full((512, 8192), float(comm.rank)))  # 16 MiB

        sums = await asyncio.gather(*map(rank, members))
        assert all(bool(total.eq(3).all()) for total in sums)


@ALGORITHMS
async def test_two_collectives_may_be_under_way(pair: Pairs, algorithm: Algorithm) -> None:
    """As halves of a prompt's chunk are: ranks may even be a phase apart."""
    async with mesh(pair, 3) as members:

        async def rank(comm: Communicator) -> list[torch.Tensor]:
            comm.begin(1, Collective(algorithm))
            out = []
            for _ in range(20):
                halves = [
                    asyncio.create_task(comm.all_reduce(torch.full((2, 7), float(comm.rank + at))))
                    for at in (0, 10)
                ]
                if comm.rank == 1:
                    await asyncio.sleep(0.001)
                out += [await half for half in halves]
            return out

        for sums in await asyncio.gather(*map(rank, members)):
            assert [float(total[0, 0]) for total in sums] == [3.0, 33.0] * 20
            assert all(bool(total.eq(total[0, 0]).all()) for total in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (3, 130), (700, 1000)])
@ALGORITHMS
async def test_halves_come_one_after_the_other(
    pair: Pairs, algorithm: Algorithm, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """A step in halves: the second may still come when the first is summed already."""
    values = [torch.randn(shape).to(dtype) for _ in range(2)]
    async with mesh(pair, 4) as members:

        async def rank(comm: Communicator) -> list[torch.Tensor]:
            comm.begin(1, Collective(algorithm))
            halves = [half.clone() if comm.rank == 0 else torch.zeros_like(half) for half in values]
            first, second = (asyncio.create_task(comm.broadcast(half)) for half in halves)
            await first
            if comm.rank == 1:
                await asyncio.sleep(0.001)
            sums = [await comm.all_reduce(halves[0].float().clone())]
            await second
            return [*halves, *sums, await comm.all_reduce(halves[1].float().clone())]

        for each in await asyncio.gather(*map(rank, members)):
            assert all(map(torch.equal, each[:2], values))
            torch.testing.assert_close(each[2:], [4 * value.float() for value in values])


@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (2, 129), (0, 5)])
@pytest.mark.parametrize("comm_dtype", CommDtype, ids=lambda comm_dtype: comm_dtype.value)
def test_senders_go_on_with_what_receivers_read(
    comm_dtype: CommDtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape) * 100
    payload, own = encode(tensor, comm_dtype)
    assert len(payload) == comm_dtype.nbytes(tensor.numel())
    assert torch.equal(decode(bytes(payload), comm_dtype, shape), own)
    with pytest.raises(TransportError, match="expected"):
        decode(bytes(payload) + b"0", comm_dtype, shape)
    again, once_more = encode(own.clone(), comm_dtype)
    if comm_dtype is not CommDtype.INT8:
        assert bytes(again) == bytes(payload)
        assert torch.equal(once_more, own)


REFUSED = {
    Fault.WRONG_STEP: "step",
    Fault.OLD_STEP: "step",
    Fault.WRONG_SEQ: "collective",
    Fault.WRONG_SHAPE: "expected",
    Fault.WRONG_DTYPE: "dtype",
    Fault.WRONG_SIZE: "expected",
    Fault.TRUNCATE: "bytes",
    Fault.GARBAGE: "malformed",
}


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.name)
async def test_master_refuses_what_does_not_fit(fault: Fault) -> None:
    """A partial that is not exactly what is due is refused, whichever rank it is from."""

    def hook(rank: int, channel: Channel) -> Channel:
        return FaultyChannel(channel, fault, kind="partial") if rank == 2 else channel

    async with star(in_memory_pair, 3, hook) as (members, _):
        for comm in members:
            comm.begin(1)
        workers = [asyncio.create_task(comm.all_reduce(torch.ones(2, 2))) for comm in members[1:]]
        with pytest.raises(TransportError, match=REFUSED[fault]):
            await members[0].all_reduce(torch.ones(2, 2))
        for task in workers:
            task.cancel()
        await asyncio.wait(workers)


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.name)
async def test_worker_refuses_what_does_not_fit(fault: Fault) -> None:
    async with in_memory_pair() as (mine, theirs):
        master = master_of(FaultyChannel(mine, fault))
        worker = worker_of(theirs)
        master.begin(1)
        worker.begin(1)
        results = await asyncio.gather(
            master.all_reduce(torch.ones(2, 2)),
            worker.all_reduce(torch.ones(2, 2)),
            return_exceptions=True,
        )
        assert isinstance(results[1], TransportError), results
        assert REFUSED[fault] in str(results[1])


@pytest.mark.parametrize("kind", ["reduced", "step", "ready", "stats", "empty"])
async def test_messages_out_of_turn_are_refused(kind: str) -> None:
    header = pb.FrameHeader()
    if kind != "empty":
        getattr(header, kind).SetInParent()
    async with in_memory_pair() as (mine, theirs):
        await theirs.send(Frame(header))
        with pytest.raises(TransportError, match=f"got {kind}"):
            await master_of(mine).all_reduce(torch.ones(1, 1))


async def test_leftovers_of_an_aborted_step_are_not_summed(pair: Pairs) -> None:
    async with star(pair, 2) as (members, _):
        master, worker = members
        master.begin(1)
        worker.begin(1)
        # The worker is one collective ahead of a master that gives the step up.
        lost = asyncio.create_task(worker.all_reduce(torch.full((2, 2), 99.0)))
        await asyncio.sleep(0)
        master.begin(2)
        abort = Frame(pb.FrameHeader(abort=pb.Abort(step=1)))
        await channel_to(master, 1).send(abort)
        with pytest.raises(StepAborted):
            await lost
        worker.begin(2)
        sums = await asyncio.gather(
            master.all_reduce(torch.ones(2, 2)), worker.all_reduce(torch.ones(2, 2))
        )
        assert all(total.eq(2).all() for total in sums)


async def test_a_late_abort_does_not_end_the_next_step(pair: Pairs) -> None:
    async with star(pair, 2) as (members, _):
        master, worker = members
        await channel_to(master, 1).send(numbered(1))
        for comm in members:
            comm.begin(2)
        sums = await asyncio.gather(
            master.all_reduce(torch.ones(1, 2)), worker.all_reduce(torch.ones(1, 2))
        )
        assert all(total.eq(2).all() for total in sums)


async def test_remote_errors_keep_their_class_and_name_the_peer() -> None:
    async with in_memory_pair() as (mine, theirs):
        master = master_of(mine)
        kinds = (("StoreError", StoreError), ("nonsense", Exception))
        for step, (kind, expected) in enumerate(kinds, start=1):
            error = pb.Error(step=step, kind=kind, message="disk on fire")
            await theirs.send(Frame(pb.FrameHeader(error=error)))
            master.begin(step)
            with pytest.raises(expected, match="worker: disk on fire"):
                await master.all_reduce(torch.ones(1, 1))


async def test_a_lost_rank_is_named(pair: Pairs) -> None:
    async with star(pair, 3) as (members, _):
        for comm in members:
            comm.begin(1)
        other = asyncio.create_task(members[1].all_reduce(torch.ones(1, 1)))
        lost = channel_to(members[0], 2)
        await lost.aclose()
        with pytest.raises(PeerLostError, match=lost.peer_id):
            await members[0].all_reduce(torch.ones(1, 1))
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
