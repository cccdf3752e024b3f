"""Addresses of peers: ``HOST[:PORT]`` as people write them, and what the system makes of a host.

Names are looked up by the system's own resolver, which knows /etc/hosts, mDNS (``pi.local``) and
whatever else this machine is configured for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

import psutil

from tpirt.errors import ConfigError

DEFAULT_PORT = 50051
DEFAULT_JOIN_PORT = 50050  # of an invitation

_LOOKUP_S = 10.0  # a DNS server that is gone takes 5 s before the next one is asked
_lookups = ThreadPoolExecutor(16, "tpirt-lookup")  # not the loop's, whose end waits for threads

_BRACKETED = re.compile(r"\[([^][\s/]+)\](?::([0-9]{1,5}))?")
_PLAIN = re.compile(r"([^][\s/:]*[^][\s/:0-9][^][\s/:]*)(?::([0-9]{1,5}))?")  # 50051 is no host


class Address(NamedTuple):
    """A host, by name or number, and a port.

    ``host`` has no brackets; an IPv6 address may have a zone (``fe80::1%eth0``).
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, lowest_port: int = 1, default_port: int = DEFAULT_PORT) -> Address:
        """Read ``HOST``, ``HOST:PORT``, ``[IPv6]`` or ``[IPv6]:PORT``.

        Raises:
            ConfigError: it is none of these.
        """
        found = _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text)
        port = int(found[2] or default_port) if found else -1
        if found is None or not lowest_port <= port <= 65535:
            raise ConfigError(
                f"{text!r}: expected HOST or HOST:PORT with a port from {lowest_port} to 65535, "
                "an IPv6 address in brackets"
            )
        return cls(found[1], port)

    def __str__(self) -> str:
        """Write it as ``HOST:PORT``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def uri(self) -> str:
        """Write it for gRPC, which takes ``unix:50051`` for a file."""
        return f"dns:///{quote(str(self), safe='[]:')}"


def check_distinct(addresses: Sequence[str]) -> None:
    """Check that no address, written in full, is there twice.

    Raises:
        ConfigError: one is.
    """
    for address, times in Counter(addresses).items():
        if times > 1:
            raise ConfigError(f"{address!r}: listed twice")


class Endpoint(NamedTuple):
    """One address of a host: what a socket connects to, or listens on."""

    family: socket.AddressFamily
    where: tuple[Any, ...]  # of the family's kind; an IPv6 one has the zone

    @property
    def host(self) -> str:
        """The address in digits, with its zone; that of an IPv4 caller on ``::`` as IPv4."""
        flags = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        host: str = socket.getnameinfo(self.where, flags)[0]
        mapped = getattr(ipaddress.ip_address(host), "ipv4_mapped", None)
        return str(mapped or host)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.where[0].partition("%")[0]).is_loopback

    @property
    def is_any(self) -> bool:
        """Whether it stands for all addresses of this machine."""
        return ipaddress.ip_address(self.where[0].partition("%")[0]).is_unspecified

    def at(self, port: int) -> Endpoint:
        """The same host's other port."""
        host, _, *rest = self.where
        return self._replace(where=(host, port, *rest))

    def listen(self) -> socket.socket:
        """Listen there, on ``::`` for both protocols.

        Raises:
            OSError: the port is in use, or the address is not this machine's.
        """
        listener = socket.create_server(
            self.where,
            family=self.family,
            dualstack_ipv6=self.where[0] == "::" and socket.has_dualstack_ipv6(),
            backlog=128,
        )
        listener.setblocking(False)
        return listener


async def resolve(address: Address, *, listening: bool = False) -> list[Endpoint]:
    """Look up all addresses of a host, the system's preferred one first.

    Args:
        address: of a peer, or to listen on.
        listening: take ``0.0.0.0`` for ``::`` where that stands for both protocols, as gRPC does.

    Raises:
        OSError: there is none; says why.
    """
    host, port = address
    if listening and host == "0.0.0.0" and socket.has_dualstack_ipv6():
        host = "::"
    # Not the loop's getaddrinfo: that of uvloop loses the zone.
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        async with asyncio.timeout(_LOOKUP_S):
            found = await asyncio.get_running_loop().run_in_executor(_lookups, look_up)
    except TimeoutError:
        raise socket.gaierror(
            socket.EAI_AGAIN, f"the lookup of its name took longer than {_LOOKUP_S:g} s"
        ) from None
    except UnicodeError as exc:  # no host can have such a name
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from exc
    return list(dict.fromkeys(Endpoint(family, where) for family, _, _, _, where in found))


def own_hosts() -> list[str]:
    """This machine's IPv4 addresses in its networks, that of the default route first.

    Loopback's if there is no other.
    """
    hosts = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: the system only chooses a route
        hosts.append(probe.getsockname()[0])
    for addresses in psutil.net_if_addrs().values():
        hosts += [each.address for each in addresses if each.family is socket.AF_INET]
    beyond = [host for host in hosts if not ipaddress.ip_address(host).is_loopback]
    return list(dict.fromkeys(beyond)) or ["127.0.0.1"]
