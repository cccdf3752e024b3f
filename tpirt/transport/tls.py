"""Mutual TLS for gRPC: the credentials, who answers at an address, and who calls.

gRPC says neither which certificate it met nor why a handshake failed. So a client makes one
handshake of its own first, and then has gRPC accept that one certificate's name only.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import grpc.aio

from tpirt.errors import IdentityError
from tpirt.identity.names import MASTER, PEER, Subject, role_host
from tpirt.identity.trust import INSECURE, Trust
from tpirt.transport.address import Address, Endpoint, resolve
from tpirt.transport.grpc_channel import CONNECT_S
from tpirt.transport.reach import race, reach

if TYPE_CHECKING:
    from tpirt.identity.certificates import Certificate, Identity

_log = logging.getLogger("tpirt.tls")

_EXPIRED, _NOT_YET, _OTHER_NAME = 10, 9, 62  # OpenSSL's X509_V_ERR_...
_NO_TLS = (
    "what answers there does not use TLS. A peer that was started with --insecure? Start it "
    f"without, or use --insecure here, too (or {INSECURE}=1). Another service? Check the port"
)
_SPOKEN_BYTES = 9  # a server's first HTTP/2 frame: it has accepted our certificate


def server_credentials(trust: Trust) -> grpc.ServerCredentials:
    """A peer's credentials; a new certificate is used from the next connection on."""
    served: list[Identity | None] = [None]

    def latest() -> grpc.ServerCertificateConfiguration | None:
        identity = trust.identity
        assert identity is not None
        if identity is served[0]:
            return None
        served[0] = identity
        return grpc.ssl_server_certificate_configuration(
            [(identity.key, identity.certificate.pem)], identity.authority
        )

    return grpc.dynamic_ssl_server_credentials(latest(), latest, True)


def client_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """The credentials of a master, or of a worker towards another."""
    return grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate.pem)


def caller(context: Any) -> Subject:
    """Who calls, as TLS has verified it.

    Raises:
        IdentityError: a certificate of the cluster that names nobody.
    """
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return Subject.of(name.decode(errors="replace") for name in names)


class Met(NamedTuple):
    """Who answers: at which of a host's addresses, in digits, and what it has shown.

    All that follows goes to this address: the name may have another one when it is looked up again.
    ``certificate`` is None if what follows is not encrypted.
    """

    address: Address
    certificate: Certificate | None


async def meet(address: Address, trust: Trust) -> Met:
    """Find out who answers at an address.

    Raises:
        OSError: nobody answers; as of ``getaddrinfo`` and ``connect``.
        TimeoutError: it neither speaks nor hangs up.
        IdentityError: it is not a peer of this cluster, or one that is not welcome any more.
    """
    endpoints = await resolve(address)
    on_loopback = all(endpoint.is_loopback for endpoint in endpoints)
    identity = await asyncio.to_thread(lambda: trust.identity)
    if trust.insecure:
        if trust.role == MASTER and not on_loopback:
            _warn_insecure(address)
    elif identity is None and not on_loopback:
        raise IdentityError(_no_identity(address, trust))
    async with asyncio.timeout(CONNECT_S):
        endpoint, connection = await race(endpoints, _reach)
        met = Met(Address(endpoint.host, address.port), None)
        if identity is None:
            connection.close()
            return met
        try:
            host = role_host(PEER, identity.subject.cluster)
            reader, writer = await _handshake(connection, _context(identity), host)
        except ssl.SSLCertVerificationError as exc:
            raise IdentityError(f"peer {address}: {_why_not_believed(exc)}") from exc
        except (ssl.SSLError, ConnectionResetError) as exc:
            if on_loopback:
                return met
            if isinstance(exc, ConnectionResetError):
                raise
            raise IdentityError(f"peer {address}: {_NO_TLS}") from exc
        try:
            return met._replace(certificate=await _accepted(reader, writer, trust, identity))
        except IdentityError as exc:
            raise IdentityError(f"peer {address}: {exc}") from exc
        finally:
            writer.transport.abort()  # a goodbye would wait for one, on a link that may be cut


async def speaks_tls(address: Address) -> bool:
    """Whether any TLS server answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(CONNECT_S):
            connection = await race(await resolve(address), reach)
            _, writer = await _handshake(connection, context, "peer")
            writer.transport.abort()
    except (OSError, TimeoutError):  # an SSLError is an OSError
        return False
    return True


async def _reach(endpoint: Endpoint) -> tuple[Endpoint, socket.socket]:
    return endpoint, await reach(endpoint)


async def _handshake(
    connection: socket.socket, context: ssl.SSLContext, host: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        return await asyncio.open_connection(sock=connection, ssl=context, server_hostname=host)
    except BaseException:
        connection.close()
        raise


async def _accepted(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trust: Trust, identity: Identity
) -> Certificate:
    """Check whom a handshake has shown, and wait until the other side has accepted us.

    Raises:
        IdentityError: it is not welcome any more, or does not accept us.
        ConnectionResetError: it hung up for another reason: it is starting, or has no place.
    """
    from tpirt.identity.certificates import Certificate

    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    certificate = Certificate.read(shown)
    await asyncio.to_thread(trust.check, certificate)
    try:
        await reader.readexactly(_SPOKEN_BYTES)
    except (EOFError, OSError) as exc:
        # gRPC sends no alert for a certificate that is out of date.
        if isinstance(exc, ssl.SSLError) or not identity.certificate.is_valid:
            raise IdentityError(_why_refused(identity)) from exc
        raise ConnectionResetError("it hung up before it said anything") from exc
    return certificate


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity.path)
    context.load_verify_locations(cadata=identity.authority.decode())
    context.set_alpn_protocols(["h2"])
    return context


def _why_not_believed(exc: ssl.SSLCertVerificationError) -> str:
    """Say what is wrong with a peer's certificate, and what to do."""
    if exc.verify_code == _EXPIRED:
        return (
            "its certificate has expired, or this machine's clock is wrong; join it again "
            "(`tpirt cluster invite`)"
        )
    if exc.verify_code == _NOT_YET:
        return "its certificate is not valid yet; is this machine's clock right?"
    if exc.verify_code == _OTHER_NAME:
        return "its certificate is not that of a peer of this cluster"
    return "its certificate is of another cluster; join it to this one (`tpirt cluster invite`)"


def _why_refused(identity: Identity) -> str:
    """Say why a peer may have refused our certificate, which it does not tell."""
    return (
        "it hung up when it saw this device's certificate, which is valid until "
        f"{identity.certificate.expires:%Y-%m-%d}; is the clock of both devices right?"
    )


def _no_identity(address: Address, trust: Trust) -> str:
    if trust.role == MASTER:
        way = "make a cluster (`tpirt cluster init`) and invite the peer (`tpirt cluster invite`)"
    else:
        way = "join this device to the cluster (`tpirt peer --join`)"
    return (
        f"peer {address}: this device has no certificate, and beyond loopback nothing goes "
        f"unprotected; {way}, or use --insecure on both sides, which encrypts nothing (or "
        f"{INSECURE}=1)"
    )


def refusal_to_listen(address: Address) -> str:
    """What to say to a peer that may not listen beyond loopback."""
    return (
        f"cannot listen on {address}: beyond this device a peer needs a certificate of a cluster. "
        "Join one: run `tpirt cluster invite` on the master and type here what it prints (tpirt "
        "peer --join ...). Or listen for this device only: --listen 127.0.0.1. Or serve everyone "
        "without encryption: --insecure"
    )


@functools.cache  # once, however often a peer that was lost is tried again
def _warn_insecure(address: Address) -> None:
    _log.warning(insecure_notice(f"peer {address} is used"))


def insecure_notice(what: str) -> str:
    """The warning about a connection that nothing protects."""
    return (
        f"INSECURE: {what} without encryption or authentication; anyone on the network can read "
        "along, pretend to be a peer, or use one"
    )
