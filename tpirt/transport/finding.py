"""Finding a device by its identity, wherever it is now.

A name or an address may lead to another device: a cloned host name, an address that was given on.
Only what answers with the certificate of the identity is the device.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tpirt.errors import IdentityError, PeerUnreachableError
from tpirt.identity.trust import Trust
from tpirt.transport.address import Address, resolve
from tpirt.transport.mdns import locate
from tpirt.transport.reach import race

if TYPE_CHECKING:
    from tpirt.transport.tls import Met

Found = tuple[Address, "Met"]


@dataclass(frozen=True)
class Device:
    """A device of the cluster.

    Attributes:
        name: what it is called.
        identity: what its certificate proves.
        places: where it may be.
        locate: finds out where else it may be.
    """

    name: str
    identity: str
    places: tuple[Address, ...]
    locate: Callable[[str], Awaitable[Sequence[Address]]] = locate


async def find(device: Device, trust: Trust) -> Found:
    """Where a device answers, and who it has shown to be.

    Raises:
        PeerUnreachableError: nobody answers where it may be.
        IdentityError: others do; or this process has no identity.
    """
    from tpirt.transport.tls import meet  # gRPC, not needed by one rank

    reasons: dict[str, Exception] = {}

    async def answering(place: Address) -> Found:
        try:
            met = await meet(place, trust)
            shown = met.certificate
            if shown is None:
                raise IdentityError(
                    f"peer {place}: what answers there shows no certificate, as on this device: "
                    "give the address instead of the name"
                )
            if shown.subject.identity != device.identity:
                raise IdentityError(f"peer {place}: another device answers there")
        except (OSError, IdentityError) as exc:
            reasons[str(place)] = exc
            raise
        return place, met

    async def known(place: Address) -> Found:
        try:
            endpoints = await resolve(place)
        except OSError as exc:
            reasons[str(place)] = exc
            raise
        return await race([Address(each.host, place.port) for each in endpoints], answering)

    async def elsewhere() -> Found:
        found = await device.locate(device.identity)
        return await race([*found, *device.places], known)  # it may be starting just now

    attempts: list[Callable[[], Awaitable[Found]]] = [
        *(partial(known, place) for place in device.places),
        elsewhere,
    ]
    try:
        return await race(attempts, lambda attempt: attempt())
    except (OSError, IdentityError) as exc:
        raise _not_found(device, reasons) from exc


def _not_found(
    device: Device, reasons: dict[str, Exception]
) -> IdentityError | PeerUnreachableError:
    tried = "; ".join(f"{place}: {_why(place, exc)}" for place, exc in reasons.items())
    text = (
        f"peer {device.name}: not found ({tried or 'it was never met'}; not announced); is `tpirt "
        "peer` running there? Or give its address"
    )
    if any(isinstance(exc, IdentityError) for exc in reasons.values()):
        return IdentityError(text)
    return PeerUnreachableError(text)


def _why(place: str, exc: Exception) -> str:
    if isinstance(exc, IdentityError):
        return str(exc).removeprefix(f"peer {place}: ")
    return str(getattr(exc, "strerror", None) or exc or "no answer").lower()
