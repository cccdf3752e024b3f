"""One rank of ``bench.allreduce``: a process that sums on order, and tells how long it took.

    python -m bench.lib.allreduce_rank CONTENDER RANK LISTEN ADDRESS,ADDRESS,...

Each line of standard input is an order, the same on all ranks; each is answered by a line.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import asdict, dataclass

import torch
import torch.distributed

from tpirt.batch import Algorithm, Batch, Collective, CommDtype, Segment
from tpirt.cli.options import run_async
from tpirt.cluster.worker_links import Switchboard, WorkerLinks
from tpirt.collectives.algorithms import GroupCommunicator
from tpirt.collectives.context import StepContext
from tpirt.collectives.links import LinkSet
from tpirt.errors import PeerUnreachableError, TpirtError, TransportError
from tpirt.identity.names import PEER
from tpirt.identity.trust import Trust
from tpirt.ops.buffers import tensor_bytes
from tpirt.protocol.link import Incoming, Link
from tpirt.transport.address import Address, Endpoint
from tpirt.transport.base import Channel
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer

GLOO = "gloo"
SEALED = "sealed"
GLOO_PORT = 29500
TIMEOUT_S = 60.0
_WARM_UP = 20
_SESSION = 1
_AWAKE_S = 3e-4
_FRAME_LIMIT = 1 << 30
_SEGMENT = Segment(slot=0, position=0, tokens=1, num_logits=1, rope_length=1)


@dataclass(frozen=True)
class Order:
    """Sum ``nbytes`` of float32 ``rounds`` times, each at its time; 0 is without pause.

    All ranks begin a round together, as they come from computing: else those that have the sum
    first would send before the others begin, and rounds would run into each other.
    """

    nbytes: int
    rounds: int
    period_s: float = 0.0
    algorithm: str = ""
    comm_dtype: str = CommDtype.FLOAT32.value


@dataclass(frozen=True)
class Answer:
    """When each round began and ended here, CPU seconds of all, a checksum of the last sum.

    Times are of the clock that all processes of a machine share.
    """

    began_s: list[float]
    ended_s: list[float]
    cpu_s: float
    checksum: int


AllReduce = Callable[[torch.Tensor], Awaitable[torch.Tensor]]
Summing = Callable[[Order], AbstractContextManager[AllReduce]]


async def measure(all_reduce: AllReduce, order: Order, rank: int) -> Answer:
    """Carry out an order."""
    partial = torch.full((1, order.nbytes // 4), float(rank + 1))
    began_s, ended_s, cpu_s = [], [], 0.0
    for number in range(_WARM_UP + order.rounds):
        if number == _WARM_UP:
            cpu_s = -time.process_time()
        mine = partial.clone()  # a sum may overwrite it
        if order.period_s:
            cpu_s -= await_turn(order.period_s)
        began_s.append(time.monotonic())
        total = await all_reduce(mine)
        ended_s.append(time.monotonic())
    cpu_s += time.process_time()
    checksum = zlib.crc32(tensor_bytes(total))
    return Answer(began_s[_WARM_UP:], ended_s[_WARM_UP:], cpu_s, checksum)


def await_turn(period_s: float) -> float:
    """Block until the clock is at a multiple of ``period_s``, and be awake by then.

    A rank comes to a sum from computing: it has a core, which a rank that has slept must get first.

    Returns:
        CPU seconds that staying awake took.
    """
    began_s = time.thread_time()
    turn = (time.monotonic() // period_s + 1) * period_s
    time.sleep(max(0.0, turn - time.monotonic() - _AWAKE_S))
    while time.monotonic() < turn:
        pass
    return time.thread_time() - began_s


class _Service:
    """A worker's side of meeting; see :class:`tpirt.transport.base.PeerService`."""

    def __init__(self) -> None:
        self.board = Switchboard()
        self.master: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self.done = asyncio.Event()

    async def answer(self, method: str, request: bytes) -> bytes:
        return request

    async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
        raise TransportError(f"{method}: refused")

    async def session(self, channel: Channel) -> None:
        self.master.set_result(channel)
        await self.done.wait()

    async def link(self, channel: Channel) -> None:
        await self.board.serve(channel)


class _TensorsOnly:
    """Handler of a link that carries nothing else; a rank that sums raises why a link is lost."""

    def on_message(self, link: Link, incoming: Incoming) -> None:
        raise TransportError(f"peer {link.peer_id}: {type(incoming.body).__name__}; refused")

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        pass


@asynccontextmanager
async def tpirt_ranks(rank: int, listen: str, addresses: list[str]) -> AsyncIterator[Summing]:
    """Meet over tpirt's own transport, as peers do, and sum with its own collectives."""
    async with AsyncExitStack() as stack:
        links = LinkSet(rank)
        stack.push_async_callback(links.aclose)
        if rank == 0:
            await _open_sessions(links, addresses, stack)
        else:
            await _await_session(links, listen, addresses, stack)
        comm = GroupCommunicator(len(addresses), links)
        numbers = itertools.count(1)

        @contextmanager
        def step(order: Order) -> Iterator[AllReduce]:
            collective = Collective(Algorithm(order.algorithm), CommDtype(order.comm_dtype))
            context = StepContext(next(numbers), Batch((_SEGMENT,), collective=collective))
            links.begin(context)
            yield lambda partial: comm.all_reduce(context, 0, partial)
            links.end(completed=True)

        yield step


@asynccontextmanager
async def gloo_ranks(rank: int, listen: str, addresses: list[str]) -> AsyncIterator[Summing]:
    """Meet through torch.distributed; it needs GLOO_SOCKET_IFNAME in the environment."""
    host = Address.parse(addresses[0]).host
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{host}:{GLOO_PORT}",
        rank=rank,
        world_size=len(addresses),
    )

    async def all_reduce(partial: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(partial)
        return partial

    yield lambda _: nullcontext(all_reduce)
    torch.distributed.destroy_process_group()


async def _open_sessions(links: LinkSet, addresses: Sequence[str], stack: AsyncExitStack) -> None:
    """Open a link to every worker, once all of them are there."""
    clients = [GrpcPeerClient(address) for address in addresses[1:]]
    for client in clients:
        stack.push_async_callback(client.aclose)
        await _until_there(client)
    for rank, client in enumerate(clients, start=1):
        links.add(_started(await client.open_session(), rank))


async def _until_there(client: GrpcPeerClient) -> None:
    """All ranks start at once, and starting takes long where there are few cores."""
    began = time.monotonic()
    while True:
        try:
            await client.call("Hello", b"", TIMEOUT_S)
        except PeerUnreachableError:
            if time.monotonic() - began > TIMEOUT_S:
                raise
        else:
            return


async def _await_session(
    links: LinkSet, listen: str, addresses: Sequence[str], stack: AsyncExitStack
) -> None:
    """Take the master's link, and form links to the other workers."""
    service = _Service()
    server = GrpcPeerServer(service)
    await server.start(*Address.parse(listen))
    stack.push_async_callback(server.aclose)
    stack.callback(service.done.set)
    links.add(_started(await service.master, 0))
    connect = functools.partial(GrpcPeerClient, trust=Trust(PEER))
    workers = WorkerLinks(links, connect, service.board, TIMEOUT_S, _FRAME_LIMIT)
    stack.push_async_callback(workers.aclose)
    workers.form(_SESSION, addresses)
    for state in await workers.formed():
        if not state.carrier:
            raise PeerUnreachableError(
                f"rank {links.rank} has no link to rank {state.rank}: {state.reason}"
            )


def _started(channel: Channel, rank: int) -> Link:
    link = Link(channel, rank, TIMEOUT_S, _TensorsOnly())
    channel.frame_limit = _FRAME_LIMIT
    link.start()
    return link


async def serve(contender: str, rank: int, listen: str, addresses: list[str]) -> None:
    """Meet the others, then carry out orders until there are no more."""
    meet = gloo_ranks if contender == GLOO else tpirt_ranks
    if contender == SEALED:  # on loopback, too, which stands for a network here
        Endpoint.is_loopback = False  # type: ignore[assignment, method-assign]
    loop = asyncio.get_running_loop()
    async with meet(rank, listen, addresses) as summing:
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = Order(**json.loads(line))
            with summing(order) as all_reduce:
                answer = await measure(all_reduce, order, rank)
            print(json.dumps(asdict(answer)), flush=True)


def main() -> None:
    """Run one rank with one thread; a failure of the group is one line and exit code 3."""
    torch.set_num_threads(1)
    contender, rank, listen, addresses = sys.argv[1:]
    try:
        run_async(serve(contender, int(rank), listen, addresses.split(",")))
    except TpirtError as exc:
        raise SystemExit(f"rank {rank}: {exc}") from exc


if __name__ == "__main__":
    main()
