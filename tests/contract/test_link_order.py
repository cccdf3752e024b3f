"""A link takes the tensors of a micro-batch in strictly increasing order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import torch

from tpirt.batch import CommDtype
from tpirt.errors import TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.protocol.link import Link
from tpirt.protocol.tensors import tensor_head
from tpirt.testing.ranks import Inbox
from tpirt.transport.frame import Frame, Kind
from tpirt.transport.memory import memory_pair

PARTIAL, REDUCED = Kind.PARTIAL, Kind.REDUCED
ROWS = torch.ones(2, 3)

Place = tuple[Kind, int]  # kind, collective
Take = Callable[[Link, Link, Sequence[Place]], Awaitable[None]]


def head(place: Place, step: int = 1) -> bytes:
    return tensor_head(place[0], step, place[1], CommDtype.FLOAT32, ROWS.shape)


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, Link]]:
    links = [
        Link(channel, rank, 10.0, Inbox()) for rank, channel in enumerate(memory_pair("b", "a"))
    ]
    try:
        for link in links:
            link.start()
            link.begin(1, 2)
        yield links[0], links[1]
    finally:
        for link in links:
            await link.aclose()


async def send(link: Link, places: Sequence[Place], step: int = 1) -> None:
    for place in places:
        await link.send(Frame(head(place, step), b"", tensor_bytes(ROWS)))


async def take_waiting(receiver: Link, sender: Link, places: Sequence[Place]) -> None:
    """Wait for each tensor before it is sent."""
    for place in places:
        waiting = asyncio.ensure_future(receiver.expect(place[1] % 2, head(place)))
        await asyncio.sleep(0)
        await send(sender, [place])
        await waiting


async def take_early(receiver: Link, sender: Link, places: Sequence[Place]) -> None:
    """Wait for the tensors after all were sent."""
    await send(sender, places)
    for place in places:
        await receiver.expect(place[1] % 2, head(place))


async def take_ahead(receiver: Link, sender: Link, places: Sequence[Place]) -> None:
    """Begin the step after its tensors were sent, but for the last one."""
    *ahead, last = places
    await send(sender, ahead, 2)
    receiver.channel.poll()
    await asyncio.sleep(0)
    receiver.begin(2, 2)
    for place in ahead:
        await receiver.expect(place[1] % 2, head(place, 2))
    await send(sender, [last], 2)
    await receiver.expect(last[1] % 2, head(last, 2))


TAKES = pytest.mark.parametrize("take", [take_waiting, take_early, take_ahead])


@TAKES
@pytest.mark.parametrize(
    "places",
    [
        [(PARTIAL, 0), (REDUCED, 0), (PARTIAL, 2)],
        [(REDUCED, 0), (REDUCED, 2), (REDUCED, 4)],
        [(PARTIAL, 1), (PARTIAL, 0), (REDUCED, 1), (REDUCED, 0)],  # parts have orders of their own
    ],
)
async def test_increasing_order_is_taken(take: Take, places: list[Place]) -> None:
    async with linked() as (receiver, sender):
        await take(receiver, sender, places)


@TAKES
@pytest.mark.parametrize(
    "places",
    [
        [(PARTIAL, 0), (PARTIAL, 0)],
        [(PARTIAL, 0), (REDUCED, 0), (REDUCED, 0)],
        [(REDUCED, 0), (PARTIAL, 0)],
        [(PARTIAL, 2), (PARTIAL, 0)],
        [(PARTIAL, 1), (PARTIAL, 0), (PARTIAL, 1)],
    ],
)
async def test_the_same_again_or_too_late_breaks_the_link(take: Take, places: list[Place]) -> None:
    async with linked() as (receiver, sender):
        with pytest.raises(TransportError, match="came again, or too late; refused"):
            async with asyncio.timeout(5):
                await take(receiver, sender, places)
