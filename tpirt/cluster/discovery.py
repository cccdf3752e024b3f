"""Which devices there are: those that joined, and those that announce themselves."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from tpirt.cancellation import finish
from tpirt.cluster import calls
from tpirt.cluster.roster import ask, busy
from tpirt.errors import ConfigError, IdentityError, TpirtError
from tpirt.identity.names import PEER
from tpirt.identity.trust import IDENTITY_FILE, Trust
from tpirt.protocol.messages import (
    HelloReply,
    StatusReply,
    StatusRequest,
)
from tpirt.transport.address import Address
from tpirt.transport.finding import Device
from tpirt.transport.mdns import Browser, Notice

if TYPE_CHECKING:
    from tpirt.identity.registry import Member
    from tpirt.transport.grpc import GrpcPeerClient

Locate = Callable[[str], Awaitable[Sequence[Address]]]

OURS, FOREIGN, NONE = "this cluster", "another cluster", "no certificate"

_PATIENCE_S = 6.0  # for one device to answer
_NO_IDENTITY = (
    "this device has no certificate; make a cluster with `tpirt cluster init`, and invite it"
)
_WORKER = "this device is a worker of a cluster; its master can tell, and use other devices"


@dataclass(frozen=True)
class Sighting:
    """A device and what it answered.

    Attributes:
        name: what it is called.
        identity: what it proves, or claims to; empty if nothing.
        address: where it answered, was announced, or was met last.
        cluster: ``OURS``, ``FOREIGN`` or ``NONE``.
        version: of tpirt; empty if unknown.
        reason: why it cannot be used now; empty if it can.
        hello, status: what it answered; None if it did not.
        member: what is in the register of it, if anything.
    """

    name: str
    identity: str
    address: str
    cluster: str
    version: str = ""
    reason: str = ""
    hello: HelloReply | None = None
    status: StatusReply | None = None
    member: Member | None = None

    @property
    def peer(self) -> str:
        """What to give as a peer to use it."""
        return self.identity if self.cluster == OURS else self.address


def client_of(peer: str, trust: Trust) -> GrpcPeerClient:
    """A client of the device of the cluster that is called or identified so; else of an address.

    Such a device is looked for where it was met last, at the address that its name has, and where
    it announces itself.

    Raises:
        ConfigError: it is not an address, either.
        IdentityError: it is the name of a device that was revoked.
    """
    from tpirt.transport.grpc import GrpcPeerClient  # 8 MiB, not needed by one rank

    given = None
    with contextlib.suppress(ConfigError):
        given = Address.parse(peer)
    registered = _registered(trust)
    members = [each for each in registered if not each.revoked]
    for member in members:
        if peer == member.identity:
            return GrpcPeerClient(_device(member), trust)
        if given is not None and given.host == member.name:
            return GrpcPeerClient(_device(member, given), trust)
    _refuse_revoked(peer, given, registered)
    return GrpcPeerClient(peer, trust, [member.name for member in members])


async def survey(
    trust: Trust, seconds: float, *, strangers: bool
) -> tuple[list[Sighting], list[str]]:
    """Find devices and ask each what it is and does.

    Args:
        trust: of this master.
        seconds: how long to look for announcements at most.
        strangers: look for devices that did not join as well, for all of this time.

    Returns:
        Those that joined and those found, by name; and what else to know.
    """
    members = {each.identity: each for each in await asyncio.to_thread(_members, trust)}
    until_s = asyncio.get_running_loop().time() + seconds
    async with Browser(members) as browser:
        asked = [
            asyncio.create_task(_joined(each, trust, partial(_locate, browser, until_s)))
            for each in members.values()
        ]
        try:
            if strangers and not browser.failure:
                await asyncio.sleep(seconds)
            found = [await task for task in asked]
        finally:
            await _cancelled(asked)
        others = [each for label, each in browser.notices.items() if label not in members]
        if strangers:
            found += await asyncio.gather(*(_stranger(each, trust) for each in others))
    for each in found:
        if each.cluster == OURS and each.hello is not None:
            with contextlib.suppress(IdentityError):
                await asyncio.to_thread(trust.registry.met, each.identity, each.address)
    return sorted(found, key=lambda each: (each.cluster != OURS, each.name)), _notes(browser)


def _notes(browser: Browser) -> list[str]:
    notes = []
    if browser.failure:
        notes.append(f"the network cannot be searched (mDNS): {browser.failure}")
    if browser.left_out:
        notes.append(f"{browser.left_out} more announcements were not looked at")
    return notes


def _refuse_revoked(peer: str, given: Address | None, members: Sequence[Member]) -> None:
    for each in members:
        if each.revoked and (peer == each.identity or (given and given.host == each.name)):
            raise IdentityError(
                f"peer {each.name}: its certificate was revoked on {each.revoked[:10]}; invite it "
                "again with `tpirt cluster invite`"
            )


def _registered(trust: Trust) -> list[Member]:
    """The devices that ever joined; none without an identity."""
    return [] if trust.identity is None else trust.registry.members()


def _members(trust: Trust) -> list[Member]:
    """The devices that joined and were not revoked."""
    return [each for each in _registered(trust) if not each.revoked]


def _device(member: Member, *others: Address) -> Device:
    places = []
    with contextlib.suppress(ConfigError):  # not met yet
        places.append(Address.parse(member.address))
    return Device(member.name, member.identity, tuple(dict.fromkeys((*places, *others))))


async def _locate(browser: Browser, until_s: float, identity: str) -> Sequence[Address]:
    if browser.failure:
        return ()
    try:
        async with asyncio.timeout_at(until_s):
            return (await browser.find(identity)).addresses
    except TimeoutError:
        return ()


async def _joined(member: Member, trust: Trust, locate: Locate) -> Sighting:
    from tpirt.transport.grpc import GrpcPeerClient

    client = GrpcPeerClient(replace(_device(member), locate=locate), trust)
    unasked = Sighting(member.name, member.identity, member.address, OURS, member=member)
    return await _answered(client, unasked)


async def _stranger(notice: Notice, trust: Trust) -> Sighting:
    """What there is to say of a device that announces itself, and is not in the register."""
    first = str(notice.addresses[0]) if notice.addresses else ""
    own = trust.identity.subject.cluster if trust.identity else None
    cluster = NONE if not notice.cluster else OURS if notice.cluster == own else FOREIGN
    found = Sighting(
        notice.name or notice.label,
        notice.label if notice.cluster else "",
        first,
        cluster,
        notice.version,
    )
    if reason := _distrust(cluster, trust):
        return replace(found, reason=reason)
    if not notice.addresses:
        return replace(found, reason="it announces no address")
    return await _at_any(notice.addresses, replace(found, reason=""), trust)


def _distrust(cluster: str, trust: Trust) -> str:
    """Why a device outside of the register is not asked."""
    if trust.insecure:
        return "" if cluster == NONE else "it uses certificates; leave out --insecure"
    if trust.identity is None:
        joined = (trust.folder.parent / PEER / IDENTITY_FILE).exists()
        return _WORKER if joined else _NO_IDENTITY
    if cluster == OURS:
        return "it is not in the register, or was revoked; invite it with `tpirt cluster invite`"
    return f"not trusted: {cluster}; invite it with `tpirt cluster invite`"


async def _at_any(addresses: Sequence[Address], unasked: Sighting, trust: Trust) -> Sighting:
    """Ask an unprotected peer at each of its addresses until one answers."""
    from tpirt.transport.grpc import GrpcPeerClient

    found = unasked
    for address in addresses:
        found = await _answered(GrpcPeerClient(str(address), trust), unasked)
        if found.hello is not None:
            break
    return found


async def _answered(client: GrpcPeerClient, unasked: Sighting) -> Sighting:
    """Ask a device, and close the client."""
    try:
        async with asyncio.timeout(2 * _PATIENCE_S):
            hello = await ask(client, secrets.randbits(63), _PATIENCE_S)
            status = await calls.ask(client, "Status", StatusRequest(), StatusReply, _PATIENCE_S)
    except TimeoutError:
        return replace(unasked, reason="no answer")
    except TpirtError as exc:
        return replace(unasked, reason=str(exc).removeprefix(f"peer {client.peer_id}: "))
    finally:
        await finish(client.aclose())
    return replace(
        unasked,
        address=client.address,
        version=hello.tpirt_version,
        reason=busy(hello) if hello.busy else "",
        hello=hello,
        status=status,
    )


async def _cancelled(tasks: Sequence[asyncio.Task[Sighting]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
