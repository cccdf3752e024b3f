"""The peers of a group and their profiles, for the planner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial

from tpirt.cluster import calls
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
from tpirt.errors import HandshakeError, PeerBusyError, PeerUnreachableError, TpirtError
from tpirt.planning import PeerProfile
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    HelloReply,
    HelloRequest,
)
from tpirt.transport.base import PeerClient
from tpirt.types import Progress, ProgressCallback, ignore_progress
from tpirt.version import __version__

HELLO_TIMEOUT_S = 20.0  # of a busy machine; one that is not there is noticed sooner
_RETRY_S = 0.25
_SAY_S = 1.0  # for a client whose peer does not answer to say why


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


Answer = HelloReply | TpirtError


def profiles(
    workers: Sequence[tuple[PeerClient, HelloReply]], master: PeerProfile
) -> list[PeerProfile]:
    """The profile of every rank, from the workers' answers, by rank.

    Raises:
        HandshakeError: a worker is given under two addresses.
    """
    _check_distinct(workers)
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
        for rank, (client, reply) in enumerate(workers, start=1)
    ]
    return [master, *others]


def machines(peers: Sequence[PeerProfile]) -> list[Machine]:
    """Group ranks by the machine whose cores they share."""
    found: dict[str, list[PeerProfile]] = {}
    for peer in peers:
        found.setdefault(peer.machine_id, []).append(peer)
    return [
        Machine(tuple(peer.rank for peer in shared), max(1, *(peer.cores for peer in shared)))
        for shared in found.values()
    ]


async def reach(
    needed: Sequence[PeerClient],
    others: Sequence[PeerClient],
    places: int,
    master: int,
    patience_s: float,
    soon_s: float,
    busy_s: float = 0.0,
    progress: ProgressCallback = ignore_progress,
) -> dict[PeerClient, Answer]:
    """Say Hello to all peers at once.

    Args:
        needed: these have ``patience_s`` to answer.
        others: these may take the places of ``needed`` ones.
        places: how many peers are wanted.
        master: this master's number.
        patience_s: see ``needed``.
        soon_s: how long ``needed`` ones that are silent are waited for although others could take
            their places.
        busy_s: how long a peer that serves another master is asked again.
        progress: told of each peer that is waited for, and of its answer.

    Returns:
        The answers, or why there is none.
    """
    began_s = _now_s()
    until_s = began_s + max(patience_s, busy_s) + _SAY_S

    async def greet(peer: PeerClient) -> Answer:
        waiting = partial(Progress, "waiting for peers", unit="peers", detail=peer.peer_id)
        progress(waiting(0, 0))
        try:
            return await _greet(peer, master, patience_s, began_s + busy_s)
        finally:
            progress(waiting(1, 1))

    tasks = {peer: asyncio.create_task(greet(peer)) for peer in (*needed, *others)}
    try:
        soon_until_s = began_s + min(patience_s, soon_s)
        while not _enough(tasks, needed, places, soon=_now_s() < soon_until_s):
            left_s = (soon_until_s if _now_s() < soon_until_s else until_s) - _now_s()
            pending = [task for task in tasks.values() if not task.done()]
            if not pending or left_s <= 0:
                break
            await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        return {peer: _result(peer, task) for peer, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


def _enough(
    tasks: Mapping[PeerClient, asyncio.Task[Answer]],
    needed: Sequence[PeerClient],
    places: int,
    *,
    soon: bool,
) -> bool:
    """Whether waiting for more answers would change nothing, or not be worth it."""
    ended = {peer: task.result() for peer, task in tasks.items() if task.done()}
    here = {peer for peer, answer in ended.items() if isinstance(answer, HelloReply)}
    if len(here.intersection(needed)) >= places:
        return True
    full, settled = len(here) >= places, all(peer in ended for peer in needed)
    return (full and settled) if soon else (full or settled)


def _result(peer: PeerClient, task: asyncio.Task[Answer]) -> Answer:
    if task.done():
        return task.result()
    return PeerUnreachableError(f"peer {peer.peer_id}: no answer")


async def _greet(client: PeerClient, master: int, patience_s: float, busy_until_s: float) -> Answer:
    while True:
        try:
            return await hello(client, master, patience_s)
        except PeerBusyError as exc:
            if _now_s() >= busy_until_s:
                return exc
            await asyncio.sleep(_RETRY_S)
        except TpirtError as exc:
            return exc


async def hello(client: PeerClient, master: int, timeout_s: float = HELLO_TIMEOUT_S) -> HelloReply:
    """Say Hello to a peer, as the master whose number is ``master``.

    Raises:
        PeerUnreachableError: no answer within ``timeout_s``.
        PeerBusyError: it serves another master.
        HandshakeError: it has another protocol version.
    """
    reply = await ask(client, master, timeout_s)
    if reply.busy:
        raise PeerBusyError(
            f"peer {client.peer_id}: is {busy(reply)}; try later, or end the chat there"
        )
    return reply


def busy(reply: HelloReply) -> str:
    """With whom a peer is busy, and since when."""
    since = time.strftime("%H:%M", time.localtime(time.time() - reply.busy_s))
    return f"busy with {reply.busy_with or 'another master'} since {since}"


async def ask(client: PeerClient, master: int, timeout_s: float) -> HelloReply:
    """As :func:`hello`, also while it serves another master."""
    question = HelloRequest(PROTOCOL_VERSION, __version__, master)
    reply = await calls.ask(client, "Hello", question, HelloReply, timeout_s)
    if reply.protocol_version != PROTOCOL_VERSION:
        older = "the peer" if reply.protocol_version < PROTOCOL_VERSION else "this machine"
        raise HandshakeError(
            f"peer {client.peer_id}: runs tpirt {reply.tpirt_version} (protocol "
            f"{reply.protocol_version}), this is tpirt {__version__} (protocol "
            f"{PROTOCOL_VERSION}); update tpirt on {older}"
        )
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


def _check_distinct(workers: Sequence[tuple[PeerClient, HelloReply]]) -> None:
    seen: dict[int, str] = {}
    for client, reply in workers:
        other = seen.setdefault(reply.process, client.peer_id)
        if reply.process and other != client.peer_id:
            raise HandshakeError(
                f"peer {client.peer_id}: is the same process as {other}; give one of the addresses"
            )
    devices: dict[str, tuple[str, str]] = {}
    for client, reply in workers:
        if (shown := client.certificate) is None:
            continue
        other, host = devices.setdefault(shown.subject.identity, (client.peer_id, reply.host_id))
        if host != reply.host_id:
            raise HandshakeError(
                f"peer {client.peer_id}: has the key and certificate of {other}; each device joins "
                "by an invitation of its own"
            )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
