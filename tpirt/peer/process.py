"""The implementation of ``tpirt peer``."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import torch

from tpirt.cluster.launcher import READY_PREFIX
from tpirt.cluster.machine import (
    available_bytes,
    base_bytes,
    host_name,
    resident_bytes,
    set_up_allocator,
)
from tpirt.cluster.worker import Worker
from tpirt.errors import MemoryLimitError
from tpirt.identity.names import random_id
from tpirt.identity.trust import Trust
from tpirt.ops.native.library import load_async
from tpirt.peer.logs import logged
from tpirt.planning import more_memory
from tpirt.planning.memory import SLACK_BYTES
from tpirt.protocol.messages import PROTOCOL_VERSION
from tpirt.refusals import raise_open_files
from tpirt.transport.address import Address
from tpirt.transport.grpc import GrpcPeerClient, GrpcPeerServer
from tpirt.transport.mdns import Announcer, Notice
from tpirt.transport.tls import insecure_notice
from tpirt.units import format_bytes
from tpirt.version import __version__
from tpirt.weights.store import SliceStore

if TYPE_CHECKING:
    from tpirt.identity.certificates import Certificate

_MOST_CONNECTIONS = 1024
_log = logging.getLogger("tpirt.peer")


@dataclass(frozen=True)
class PeerOptions:
    """Options of a worker peer; with ``until_stdin_closes`` it ends with its parent."""

    host: str
    port: int
    memory_bytes: int | None
    threads: int
    store: SliceStore
    until_stdin_closes: bool
    quiet: bool
    trust: Trust
    announce: bool = True


async def run_peer(options: PeerOptions, invitation: str | None = None) -> None:
    """Listen and serve until a signal, or until standard input closes.

    With an ``invitation``, ``HOST:PORT/CODE``, join its cluster first.

    Prints one line with the address once it listens, then logs one line per event on standard
    error.

    Raises:
        TransportError: the address cannot be listened on.
        IdentityError: it needs a certificate, and there is none.
        MemoryLimitError: the process itself needs more than its limit.
    """
    set_up_allocator()
    stop = asyncio.Event()
    with logged(logging.WARNING if options.quiet else logging.INFO):
        if invitation is not None:
            from tpirt.cluster.membership import join_cluster  # 17 MB, needed once

            await join_cluster(options.trust, invitation, host_name(), options.port)
        if await _has_loaded(stop):
            await _run(options, stop)


async def _has_loaded(stop: asyncio.Event) -> bool:
    """Load the kernels: while no master waits, for it may compile them.

    From now on SIGINT and SIGTERM set ``stop``; returns False if they do so meanwhile.
    """
    loading = asyncio.ensure_future(load_async())

    def end() -> None:
        stop.set()
        loading.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    try:
        await loading
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    return not stop.is_set()


async def _run(options: PeerOptions, stop: asyncio.Event) -> None:
    torch.set_num_threads(options.threads)

    def log(event: str) -> None:
        if not stop.is_set():  # then sessions end because the process does
            _log.info(event)

    worker = Worker(
        host_name(),
        options.store,
        options.memory_bytes,
        options.threads,
        log,
        lambda address: GrpcPeerClient(address, options.trust),
        options.trust,
    )
    server = GrpcPeerServer(worker, _most_connections(), options.trust)
    port = await server.start(options.host, options.port)
    try:
        announcer = _announcer(options, server.hosts, port)
        _check_memory(options.memory_bytes)
        address = Address(options.host, port)
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"{READY_PREFIX}{address} (store {options.store.root})", flush=True)
        if server.is_protected and (identity := options.trust.identity):
            _log.log(*_membership(identity.certificate))
        elif warning := _warning(address, server.hosts):
            _log.warning(f"warning: {warning}")
        if options.until_stdin_closes:
            _watch_stdin(stop)
        async with announcer.running() if announcer else contextlib.nullcontext():
            await stop.wait()
        await worker.leave()
    finally:
        await server.aclose()


def _membership(certificate: Certificate) -> tuple[int, str]:
    """What to say of a peer's certificate, after the level of the log."""
    until = f"{certificate.expires:%Y-%m-%d}"
    if certificate.is_valid:
        text = (
            f"{certificate.name} serves the master of its cluster; its certificate is valid until"
        )
        return logging.INFO, f"{text} {until}"
    return logging.WARNING, (
        f"warning: no master can connect: by this device's clock ({datetime.now():%Y-%m-%d %H:%M}) "
        f"the certificate of {certificate.name}, until {until}, is not valid; set the clock, or "
        "join again (`tpirt cluster invite`)"
    )


def _announcer(options: PeerOptions, hosts: Sequence[str], port: int) -> Announcer | None:
    """What announces the peer to its network, if that reaches it and the user wants it."""
    if not options.announce or all(map(is_loopback, hosts)):
        return None
    identity = options.trust.identity
    notice = Notice(
        label=identity.subject.identity if identity else random_id(),
        name=identity.certificate.name if identity else host_name(),
        cluster=identity.subject.cluster if identity else "",
        version=__version__,
        protocol=str(PROTOCOL_VERSION),
    )
    return Announcer(notice, hosts, port, _log.warning)


def _check_memory(limit: int | None) -> None:
    """Raise MemoryLimitError if the process needs more than its limit without any model."""
    if limit is None or (needed := base_bytes() + SLACK_BYTES) <= limit:
        return
    raise MemoryLimitError(
        f"--memory {format_bytes(limit)}: the process needs {format_bytes(needed)} without any "
        f"weights; {more_memory(needed, available_bytes() + resident_bytes())}"
    )


def _warning(address: Address, hosts: Sequence[str]) -> str:
    """What to say of who can connect; empty if ``address`` says it.

    Args:
        address: as given by the user.
        hosts: the addresses that this stands for, without TLS.
    """
    if not all(map(is_loopback, hosts)):
        return insecure_notice(f"{address} is served")
    if is_loopback(address.host):
        return ""
    return (
        f"{address.host} is {' and '.join(hosts)} on this device, where no other device can "
        f"connect; for others, use --listen 0.0.0.0:{address.port} or an address of the network"
    )


def _most_connections() -> int:
    """Open files for gRPC's connections: half of what the system allows, the rest is for work."""
    return min(_MOST_CONNECTIONS, raise_open_files(4 * _MOST_CONNECTIONS) // 2)


def is_loopback(host: str) -> bool:
    """Whether an address is only reachable from this machine; only localhost among names."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _watch_stdin(stop: asyncio.Event) -> None:
    """Set ``stop`` when the other end of standard input is closed.

    Waits in a thread, because an event loop cannot poll every kind of file.
    """
    loop = asyncio.get_running_loop()

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, name="tpirt-stdin", daemon=True).start()
