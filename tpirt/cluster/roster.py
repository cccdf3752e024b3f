"""The peers of a group: what each one is, asked before anything is planned."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tpirt.cluster.machine import (
    available_bytes,
    has_bfloat16,
    host_id,
    int4_layout,
    machine_cores,
    resident_bytes,
)
from tpirt.collectives.cost_model import Machine
from tpirt.errors import HandshakeError
from tpirt.ops.quant_layout import PORTABLE_LAYOUT, Layout
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    HelloReply,
    HelloRequest,
    decode_call,
    encode_call,
)
from tpirt.transport.base import PeerClient
from tpirt.version import __version__

_HELLO_TIMEOUT_S = 10.0
_SHARE_OF_FREE_MEMORY = 0.85


@dataclass(frozen=True)
class PeerProfile:
    """What one rank's peer said of itself when it was asked."""

    rank: int
    peer_id: str
    host_id: str
    memory_bytes: int | None
    available_bytes: int
    threads: int
    cores: int
    bfloat16: bool
    int4_layout: Layout


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
        int4_layout=int4_layout(),
    )


async def profile_peers(clients: Sequence[PeerClient], threads: int) -> list[PeerProfile]:
    """Ask every worker who it is; entry 0 is this process itself.

    Raises:
        PeerUnreachableError: nobody answers at an address.
        HandshakeError: a peer speaks another protocol version or serves another master.
    """
    replies = await asyncio.gather(*(hello(client) for client in clients))
    others = [
        PeerProfile(
            rank,
            client.peer_id,
            reply.host_id,
            reply.memory_bytes,
            reply.available_bytes,
            reply.threads,
            reply.cores,
            reply.bfloat16,
            Layout.named(reply.int4_layout) or PORTABLE_LAYOUT,
        )
        for rank, (client, reply) in enumerate(zip(clients, replies, strict=True), start=1)
    ]
    return [this_peer(threads), *others]


def memory_limits(peers: Sequence[PeerProfile], asked: int | None) -> list[int]:
    """Decide each rank's memory limit: what was asked for, or a fair share of what is free.

    Ranks on one machine share its free memory; a tenth and a half stays for everything else.
    """
    limits = []
    for peer in peers:
        beside = sum(other.host_id == peer.host_id for other in peers)
        share = int(peer.available_bytes * _SHARE_OF_FREE_MEMORY / beside)
        limits.append(min(asked or share, peer.memory_bytes or asked or share))
    return limits


def machines(peers: Sequence[PeerProfile]) -> list[Machine]:
    """Who shares a machine's cores with whom."""
    found: dict[str, list[PeerProfile]] = {}
    for peer in peers:
        found.setdefault(peer.host_id, []).append(peer)
    return [
        Machine(tuple(peer.rank for peer in beside), max(1, beside[0].cores))
        for beside in found.values()
    ]


async def hello(client: PeerClient) -> HelloReply:
    """Ask a peer who it is.

    Raises:
        PeerUnreachableError: nobody answers.
        HandshakeError: it speaks another protocol version or serves another master.
    """
    request = encode_call(HelloRequest(PROTOCOL_VERSION, __version__))
    answer = await client.call("Hello", request, _HELLO_TIMEOUT_S)
    reply = decode_call(HelloReply, answer, client.address)
    client.peer_id = reply.peer_id or client.address
    if reply.protocol_version != PROTOCOL_VERSION:
        raise HandshakeError(
            f"peer {client.peer_id}: speaks protocol {reply.protocol_version} (tpirt "
            f"{reply.tpirt_version}), this is {PROTOCOL_VERSION} (tpirt {__version__}); "
            "install the same tpirt on both"
        )
    if reply.busy:
        raise HandshakeError(f"peer {client.peer_id}: serves another master now; try later")
    return reply
