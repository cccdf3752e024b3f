"""A device's next key and certificate, over the connection that the present one protects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tpirt.errors import IdentityError, TpirtError
from tpirt.identity.names import PEER
from tpirt.identity.trust import Trust
from tpirt.protocol.messages import RenewReply, RenewRequest, decode_call, encode_call

if TYPE_CHECKING:
    from tpirt.identity.certificates import Certificate
    from tpirt.identity.registry import Member
    from tpirt.transport.base import PeerClient

_PATIENCE_S = 20.0
_log = logging.getLogger("tpirt.cluster")


class Renewal:
    """The peer's side: makes a key, whose private half stays here, and takes its certificate."""

    def __init__(self, trust: Trust):
        self._trust = trust
        self._key = b""  # of the request that was answered last

    def answer(self, asked: RenewRequest) -> RenewReply:
        """Answer with a certificate request; or take the certificate.

        Raises:
            IdentityError: it is not the one that was requested, or cannot be kept.
        """
        from tpirt.identity.certificates import Certificate, Identity, new_request

        identity = self._trust.identity
        if identity is None:
            raise IdentityError("it has no certificate that could be replaced")
        if not asked.certificate:
            self._key, request = new_request()
            return RenewReply(request=request)
        certificate = Certificate.read(asked.certificate)
        certificate.check(self._key, identity.authority)
        if certificate.subject != identity.subject:
            raise IdentityError("the next certificate is of another device")
        self._trust.replace(Identity(identity.path, self._key, certificate, identity.authority))
        return RenewReply()


async def renew(client: PeerClient, trust: Trust, member: Member) -> Certificate:
    """Have a peer replace its key and certificate; it keeps its identity.

    Raises:
        IdentityError: this device has no authority, or another device than ``member`` answers.
        PeerError, PeerUnreachableError: it cannot, or does not answer.
    """
    from tpirt.cluster.membership import authority_of

    authority = await asyncio.to_thread(authority_of, trust)
    await client.connect()
    if (shown := client.certificate) is None:
        raise IdentityError(f"peer {client.peer_id}: it shows no certificate")
    if (identity := shown.subject.identity) != member.identity:
        raise IdentityError(
            f"peer {client.peer_id}: {shown.name} ({identity}) answers there, expected "
            f"{member.name} ({member.identity}); use {member.name} once with --peers, so that its "
            "address becomes known"
        )

    async def ask(request: RenewRequest) -> RenewReply:
        answer = await client.call("Renew", encode_call(request), _PATIENCE_S)
        return decode_call(RenewReply, answer, client.peer_id)

    request = (await ask(RenewRequest())).request
    certificate = authority.issue(request, PEER, shown.name, identity)
    await ask(RenewRequest(certificate=certificate.pem))
    await asyncio.to_thread(trust.registry.renewed, certificate)
    return certificate


async def keep_up(trust: Trust, clients: Iterable[PeerClient]) -> None:
    """Record where peers were met, and replace certificates that end soon.

    What fails is logged: they are good for some days more.
    """
    await asyncio.gather(*(_keep_up(trust, client) for client in clients))


async def _keep_up(trust: Trust, client: PeerClient) -> None:
    if (shown := client.certificate) is None:
        return
    try:
        identity = shown.subject.identity
        member = await asyncio.to_thread(trust.registry.met, identity, client.address)
        if shown.is_due:
            until = (await renew(client, trust, member)).expires
            _log.info(f"peer {client.peer_id}: new certificate, until {until:%Y-%m-%d}")
    except TpirtError as exc:
        left = "its certificate was not replaced" if shown.is_due else "its address was not noted"
        _log.warning(f"peer {client.peer_id}: {left}: {exc}")
