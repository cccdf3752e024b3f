"""The peers of a group and their profiles, for the planner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tpirt.cluster.machine import (
    available_bytes,
    base_bytes,
    has_bfloat16,
    host_id,
    host_name,
    machine_cores,
    resident_bytes,
)
from tpirt.collectives.cost_model import Machine
from tpirt.errors import HandshakeError, PeerBusyError
from tpirt.planning import PeerProfile
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    HelloReply,
    HelloRequest,
    decode_call,
    encode_call,
)
from tpirt.transport.base import PeerClient
from tpirt.version import __version__

_HELLO_TIMEOUT_S = 20.0  # of a busy machine; one that is not there is noticed sooner
_RETRY_S = 0.25


def this_peer(threads: int) -> PeerProfile:
    """Describe this process as rank 0."""
    return PeerProfile(
        rank=0,
        peer_id="master",
        host_id=host_id(),
        memory_bytes=None,
        available_bytes=available_bytes() + resident_bytes(),
        threads=threads,
        cores=machine_cores(),
        bfloat16=has_bfloat16(),
        base_bytes=base_bytes(),
        host_name=host_name(),
    )


async def profile_peers(
    clients: Sequence[PeerClient], threads: int, master: int
) -> list[PeerProfile]:
    """Request the profile of every worker; entry 0 is this process, whose number is ``master``.

    Raises:
        PeerUnreachableError: no answer at an address.
        HandshakeError: a peer has another protocol version, serves another master, or is given
            under two addresses.
    """
    replies = await asyncio.gather(*(hello(client, master) for client in clients))
    _check_distinct(clients, replies)
    others = [
        PeerProfile(
            rank,
            peer_id=client.peer_id,
            host_id=reply.host_id,
            memory_bytes=reply.memory_bytes,
            available_bytes=reply.available_bytes,
            threads=reply.threads,
            cores=reply.cores,
            bfloat16=reply.bfloat16,
            base_bytes=reply.base_bytes,
            host_name=reply.host_name,
            version=reply.tpirt_version,
        )
        for rank, (client, reply) in enumerate(zip(clients, replies, strict=True), start=1)
    ]
    return [this_peer(threads), *others]


def machines(peers: Sequence[PeerProfile]) -> list[Machine]:
    """Group ranks by the machine whose cores they share."""
    found: dict[str, list[PeerProfile]] = {}
    for peer in peers:
        found.setdefault(peer.machine_id, []).append(peer)
    return [
        Machine(tuple(peer.rank for peer in shared), max(1, *(peer.cores for peer in shared)))
        for shared in found.values()
    ]


async def return_to(clients: Sequence[PeerClient], master: int, patience_s: float) -> None:
    """Say Hello to every worker again over a new connection: the old one may lead nowhere.

    A worker that serves another master, and one that does not answer, have ``patience_s``.

    Raises: as :func:`profile_peers`.
    """

    async def greet(client: PeerClient) -> None:
        await client.aclose()
        until_s = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                await hello(client, master, min(patience_s, _HELLO_TIMEOUT_S))
            except PeerBusyError:
                if asyncio.get_running_loop().time() > until_s:
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                return

    answers = await asyncio.gather(*map(greet, clients), return_exceptions=True)
    for answer in answers:
        if answer is not None:
            raise answer


async def hello(client: PeerClient, master: int, timeout_s: float = _HELLO_TIMEOUT_S) -> HelloReply:
    """Say Hello to a peer, as the master whose number is ``master``.

    Raises:
        PeerUnreachableError: no answer within ``timeout_s``.
        PeerBusyError: it serves another master.
        HandshakeError: it has another protocol version.
    """
    request = encode_call(HelloRequest(PROTOCOL_VERSION, __version__, master))
    answer = await client.call("Hello", request, timeout_s)
    reply = decode_call(HelloReply, answer, client.peer_id)
    if reply.protocol_version != PROTOCOL_VERSION:
        older = "the peer" if reply.protocol_version < PROTOCOL_VERSION else "this machine"
        raise HandshakeError(
            f"peer {client.peer_id}: runs tpirt {reply.tpirt_version} (protocol "
            f"{reply.protocol_version}), this is tpirt {__version__} (protocol "
            f"{PROTOCOL_VERSION}); update tpirt on {older}"
        )
    if reply.busy:
        raise PeerBusyError(f"peer {client.peer_id}: serves another master now; try later")
    return reply


def other_versions(peers: Sequence[PeerProfile]) -> list[str]:
    """Say which peers run another tpirt than this process, one line for each version."""
    found: dict[str, list[str]] = {}
    for peer in peers:
        if peer.version != __version__:
            found.setdefault(peer.version, []).append(peer.peer_id)
    return [
        f"{', '.join(names)}: tpirt {version} there, {__version__} here; results may differ, so "
        "update the older one"
        for version, names in found.items()
    ]


def _check_distinct(clients: Sequence[PeerClient], replies: Sequence[HelloReply]) -> None:
    seen: dict[int, str] = {}
    for client, reply in zip(clients, replies, strict=True):
        other = seen.setdefault(reply.process, client.peer_id)
        if reply.process and other != client.peer_id:
            raise HandshakeError(
                f"peer {client.peer_id}: is the same process as {other}; give one of the addresses"
            )
