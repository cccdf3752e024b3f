"""Links between workers on their way to the session that claims them."""

from __future__ import annotations

import asyncio

from tpirt.cluster.worker_links import Switchboard
from tpirt.errors import TpirtError, TransportError
from tpirt.protocol.link import Link
from tpirt.protocol.messages import JoinLink
from tpirt.testing.ranks import Inbox
from tpirt.transport.memory import memory_pair


async def claim_as_it_ends(turns: int) -> TpirtError | TimeoutError | None:
    """Cancel the serving of a link after some turns of the loop, and claim it in the same turn."""
    board = Switchboard()
    mine, theirs = memory_pair("worker 1", "worker 2")
    link = Link(mine, 1, 10.0, Inbox())
    link.start()
    serving = asyncio.ensure_future(board.serve(theirs))
    joining = asyncio.ensure_future(link.request(JoinLink(7, 2)))
    for _ in range(turns):
        await asyncio.sleep(0)
    serving.cancel()
    try:
        async with asyncio.timeout(0):
            await board.claim(7, 2)
    except (TpirtError, TimeoutError) as exc:
        return exc
    else:
        return None
    finally:
        await link.aclose()
        await asyncio.gather(serving, joining, return_exceptions=True)


async def test_a_link_that_ends_as_it_is_claimed_is_not_handed_out() -> None:
    outcomes = [await claim_as_it_ends(turns) for turns in range(30)]
    assert isinstance(outcomes[0], TimeoutError)  # it has not arrived yet
    ended = outcomes[-1]
    assert isinstance(ended, TransportError), ended
    assert "the link ended before it was used" in str(ended)
    assert None not in outcomes
