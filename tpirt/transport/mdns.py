"""Multicast DNS: what a peer announces to its network, and what others announce.

An announcement proves nothing: it says where to ask. Who answers there is for TLS to find out. What
comes from the network is bounded in number and size, and printable.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from tpirt.printable import printable_line
from tpirt.transport.address import Address

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncZeroconf

SERVICE = "_tpirt._tcp.local."

_LABEL = re.compile(r"[0-9a-f]{16}")
_MOST_STRANGERS = 64
_MOST_ADDRESSES = 8
_MOST_TEXT = 64  # characters
_AT_ONCE = 16
_RESOLVE_MS = 3_000
_LOOK_S = 5.0  # whether this device's addresses have changed

logging.getLogger("zeroconf").setLevel(logging.CRITICAL)  # what matters becomes one line of ours


@dataclass(frozen=True)
class Notice:
    """What a peer announces of itself.

    Attributes:
        label: its identity; a random number if it is in no cluster.
        name: what it calls itself.
        cluster: random number of its cluster; empty if it is in none.
        version: of tpirt.
        protocol: its version.
        addresses: where it says that it listens.
    """

    label: str
    name: str
    cluster: str
    version: str
    protocol: str
    addresses: tuple[Address, ...] = ()


class Announcer:
    """Announces a peer, again whenever this device's addresses change."""

    def __init__(
        self, notice: Notice, hosts: Collection[str], port: int, log: Callable[[str], None]
    ):
        """Announce ``notice`` on those of this device's addresses that ``hosts`` stands for.

        ``log`` is called with what goes wrong, which is never an error.
        """
        self._notice = notice
        self._hosts = hosts
        self._port = port
        self._log = log
        self._zeroconf: AsyncZeroconf | None = None
        # Now: its 3 MB belong to what the process takes before it holds anything of a model.
        import zeroconf.asyncio  # noqa: F401

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Announce within the block; then say goodbye."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        announced: Sequence[_Own] | None = None
        try:
            while True:
                if (addresses := _own_addresses(self._hosts)) != announced:
                    announced = addresses
                    await self._close()
                    await self._announce(addresses)
                await asyncio.sleep(_LOOK_S)
        finally:
            await self._close()

    async def _announce(self, addresses: Sequence[_Own]) -> None:
        try:
            self._zeroconf = _open(addresses)
            from zeroconf.asyncio import AsyncServiceInfo

            notice = self._notice
            info = AsyncServiceInfo(
                SERVICE,
                f"{notice.label}.{SERVICE}",
                port=self._port,
                properties={
                    "name": notice.name[:_MOST_TEXT],
                    "cluster": notice.cluster,
                    "version": notice.version,
                    "protocol": notice.protocol,
                },
                server=f"{notice.label}.local.",
                parsed_addresses=[own.host for own in addresses],
            )
            # Its name is a random number, so nobody has to be asked whether it is taken.
            sent = await self._zeroconf.async_register_service(info, cooperating_responders=True)
            await sent
        except _failures() as exc:
            self._log(f"not announced on the network: {_why(exc)}; masters need its address")

    async def _close(self) -> None:
        zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is not None:
            with contextlib.suppress(*_failures()):
                await zeroconf.async_close()


class Browser:
    """What peers announce while it is open; a context manager.

    Attributes:
        notices: by label.
        failure: why nothing can be found; empty if something can.
        left_out: announcements beyond the most that are looked at.
    """

    def __init__(self, known: Collection[str] = ()):
        """Look for all that is announced; the labels ``known`` before any number of others."""
        self.notices: dict[str, Notice] = {}
        self.failure = ""
        self.left_out = 0
        self._known = known
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._news = asyncio.Event()
        self._zeroconf: AsyncZeroconf | None = None

    async def __aenter__(self) -> Browser:
        """Begin to look."""
        try:
            self._zeroconf = _open(_own_addresses(("0.0.0.0", "::")))
            await self._zeroconf.zeroconf.async_wait_for_start()
            from zeroconf.asyncio import AsyncServiceBrowser

            AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[self._heard])
        except _failures() as exc:
            self.failure = _why(exc)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Stop looking."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._zeroconf is not None:
            with contextlib.suppress(*_failures()):
                await self._zeroconf.async_close()

    async def find(self, label: str) -> Notice:
        """Wait until a peer is announced."""
        while label not in self.notices:
            self._news.clear()
            await self._news.wait()
        return self.notices[label]

    def _heard(self, *, name: str, **_: Any) -> None:
        label = name.removesuffix(f".{SERVICE}")
        if label in self._tasks or not _LABEL.fullmatch(label):
            return
        strangers = sum(each not in self._known for each in self._tasks)
        if label not in self._known and strangers >= _MOST_STRANGERS:
            self.left_out += 1
            return
        self._tasks[label] = asyncio.create_task(self._ask(label))

    async def _ask(self, label: str) -> None:
        from zeroconf.asyncio import AsyncServiceInfo

        assert self._zeroconf is not None
        info = AsyncServiceInfo(SERVICE, f"{label}.{SERVICE}")
        async with contextlib.nullcontext() if label in self._known else self._places:
            with contextlib.suppress(*_failures()):
                if await info.async_request(self._zeroconf.zeroconf, _RESOLVE_MS):
                    self.notices[label] = read_notice(
                        label, info.port or 0, info.parsed_scoped_addresses(), info.properties
                    )
                    self._news.set()


def read_notice(
    label: str, port: int, hosts: Sequence[str], text: dict[bytes, bytes | None]
) -> Notice:
    """Make what somebody announces fit to be shown and used."""

    def field(name: str) -> str:
        value = text.get(name.encode()) or b""
        return printable_line(value[: 4 * _MOST_TEXT].decode(errors="replace"))[:_MOST_TEXT]

    addresses = tuple(Address(host, port) for host in hosts if port and _is_usable(host))
    return Notice(
        label,
        field("name"),
        field("cluster"),
        field("version"),
        field("protocol"),
        addresses[:_MOST_ADDRESSES],
    )


async def locate(identity: str, patience_s: float = 3.0) -> tuple[Address, ...]:
    """Where a peer announces that it listens; nothing if it does not."""
    async with Browser({identity}) as browser:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if browser.failure else patience_s):
                return (await browser.find(identity)).addresses
    return ()


class _Own(NamedTuple):
    """An address of this device, and the number of its interface."""

    host: str
    interface: int


def _own_addresses(hosts: Collection[str]) -> list[_Own]:
    """Those of this device's addresses that are among ``hosts``, or that these stand for."""
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            host = each.address.partition("%")[0]
            match each.family:
                case socket.AddressFamily.AF_INET:
                    whole = "0.0.0.0" in hosts or "::" in hosts
                case socket.AddressFamily.AF_INET6:
                    whole = "::" in hosts
                case _:
                    continue
            if (whole or host in hosts or each.address in hosts) and _is_usable(host):
                with contextlib.suppress(OSError):  # the interface is gone again
                    found.append(_Own(host, socket.if_nametoindex(name)))
    return sorted(found)[:_MOST_ADDRESSES]


def _is_usable(host: str) -> bool:
    """Whether others may reach an address."""
    try:
        parsed = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return not (parsed.is_loopback or parsed.is_multicast or parsed.is_unspecified)


def _open(addresses: Sequence[_Own]) -> AsyncZeroconf:
    """Open mDNS on the interfaces of these addresses.

    Raises: one of :func:`_failures`.
    """
    from zeroconf.asyncio import AsyncZeroconf

    if not addresses:
        raise OSError("this device has no network")
    interfaces: list[str | int] = [own.host for own in addresses if ":" not in own.host]
    interfaces += sorted({own.interface for own in addresses if ":" in own.host})
    return AsyncZeroconf(interfaces=interfaces)


def _failures() -> tuple[type[Exception], ...]:
    """What may go wrong with mDNS: no network, no right, a port in use, no answer."""
    from zeroconf import Error

    return (OSError, RuntimeError, TimeoutError, ValueError, Error)


def _why(exc: Exception) -> str:
    return printable_line(getattr(exc, "strerror", None) or str(exc) or type(exc).__name__)
