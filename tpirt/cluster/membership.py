"""Making a cluster, inviting a device, and joining: what is done on either device's disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tpirt.cancellation import finish, in_thread
from tpirt.errors import IdentityError
from tpirt.identity.authority import Authority
from tpirt.identity.certificates import Certificate, Identity, new_request
from tpirt.identity.join import JoinReply, JoinRequest
from tpirt.identity.names import PEER, random_id
from tpirt.identity.registry import Member
from tpirt.identity.trust import AUTHORITY_FILE, IDENTITY_FILE, Trust
from tpirt.transport.address import DEFAULT_JOIN_PORT, Address
from tpirt.transport.joining import Issue, join

_log = logging.getLogger("tpirt.peer")


def create_cluster(trust: Trust, name: str) -> Identity:
    """Create a cluster whose master is this device.

    Raises:
        IdentityError: it is the master of one already, or its files cannot be written.
    """
    path = trust.folder / AUTHORITY_FILE
    if (existing := Authority.load(path)) is not None:
        raise IdentityError(
            f"this device is the master of cluster {existing.name} already; to give it and all its "
            f"certificates up, remove {trust.folder}"
        )
    authority = Authority.create(name)
    authority.save(path)
    try:
        trust.registry.rewrite()
        identity = authority.issue_own(trust.folder / IDENTITY_FILE, random_id())
        identity.save()
    except IdentityError:
        path.unlink()  # not half a cluster
        raise
    return identity


def authority_of(trust: Trust) -> Authority:
    """The authority of the cluster whose master is this device.

    Raises:
        IdentityError: it is not the master of one.
    """
    if (authority := Authority.load(trust.folder / AUTHORITY_FILE)) is None:
        raise IdentityError(
            f"this device is not the master of a cluster ({trust.folder / AUTHORITY_FILE} is "
            "missing); make one with `tpirt cluster init`"
        )
    return authority


def issuer(trust: Trust, name: str | None, joined: Callable[[Member], None]) -> Issue:
    """Return what answers a device that knows the code; ``joined`` is called with what it became.

    ``name`` is its name, by default what it calls itself. It is in the register until the block
    fails.

    Raises:
        IdentityError: this device is not the master of a cluster, or its files are damaged; or
            another device has this name.
    """
    authority, registry = authority_of(trust), trust.registry
    if not registry.rewrite():  # which fails before a device has come
        _log.warning(
            "the register of devices was missing, and an empty one was made: devices that joined "
            "before are refused until they are invited again, or a copy is restored"
        )
    if name is not None:
        registry.check_free(name)

    def register(request: JoinRequest, host: str) -> tuple[Member, Certificate]:
        def issue(free: str) -> Certificate:
            return authority.issue(request.request.encode(), PEER, free, random_id())

        address = str(Address(host, request.port)) if 0 < request.port < 65536 else ""
        return registry.add(name or request.name, issue, address)

    @asynccontextmanager
    async def issued(request: JoinRequest, host: str) -> AsyncIterator[JoinReply]:
        registering = asyncio.create_task(asyncio.to_thread(register, request, host))
        try:
            _, certificate = await finish(registering)
            yield JoinReply(certificate.pem.decode(), authority.pem.decode(), authority.name)
        except BaseException:
            if registering.done() and not registering.exception():
                await in_thread(registry.remove, registering.result()[0].identity)
            raise
        joined(registering.result()[0])

    return issued


async def join_cluster(trust: Trust, where: str, name: str, port: int) -> None:
    """Get this device a certificate; an earlier one, of any cluster, is replaced.

    Args:
        trust: of this device, as a peer.
        where: ``HOST:PORT/CODE``, as the master shows it.
        name: what to call this device.
        port: where it serves.

    Raises:
        ConfigError: not a host and port.
        IdentityError, PeerUnreachableError: it failed.
    """
    host, slash, code = where.rpartition("/")
    if not slash:
        raise IdentityError(f"{where!r}: expected HOST:PORT/CODE, as `tpirt cluster invite` shows")
    key, request = new_request()
    path = trust.folder / IDENTITY_FILE
    before = _held(trust)

    def keep(reply: JoinReply) -> None:
        certificate = Certificate.read(reply.certificate.encode())
        authority = reply.authority.encode()
        certificate.check(key, authority)
        if certificate.subject.role != PEER:
            raise IdentityError(f"a certificate of a {certificate.subject.role}")
        trust.replace(Identity(path, key, certificate, authority))
        _log.info(
            f"joined cluster {reply.cluster} as {certificate.name}, until "
            f"{certificate.expires:%Y-%m-%d} ({path})"
        )
        if before is not None and before.subject.cluster == certificate.subject.cluster:
            _log.warning(
                f"until now this device was {before.name} in that cluster; on its master "
                f"`tpirt cluster revoke {before.name}` takes that off the list"
            )

    address = Address.parse(host, default_port=DEFAULT_JOIN_PORT)
    _log.info(f"joining at {address}")
    await join(address, code, JoinRequest(name, port, request.decode()), keep)


def _held(trust: Trust) -> Certificate | None:
    """The certificate that this device has so far, if it can be read."""
    try:
        return trust.identity.certificate if trust.identity else None
    except IdentityError:
        return None
