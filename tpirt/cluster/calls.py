"""Questions to a peer."""

from __future__ import annotations

from typing import TypeVar

from tpirt.errors import DamagedLinkError, TransportError
from tpirt.protocol.messages import decode_call, encode_call
from tpirt.transport.base import PeerClient

_T = TypeVar("_T")


async def ask(
    client: PeerClient, method: str, question: object, reply: type[_T], timeout_s: float
) -> _T:
    """Ask a peer for a ``reply``; once more if that, or the question, was damaged in the clear.

    Raises:
        PeerUnreachableError: no answer within ``timeout_s`` each time.
        PeerError: the peer refuses.
        DamagedLinkError: damaged twice.
        TransportError: no such reply, from a peer that proves who it is.
    """
    try:
        return await _ask(client, method, question, reply, timeout_s)
    except DamagedLinkError:
        return await _ask(client, method, question, reply, timeout_s)


async def _ask(
    client: PeerClient, method: str, question: object, reply: type[_T], timeout_s: float
) -> _T:
    answer = await client.call(method, encode_call(question), timeout_s)
    try:
        return decode_call(reply, answer, client.peer_id)
    except TransportError as exc:
        if client.certificate is not None:
            raise
        raise DamagedLinkError.of(exc) from None
