"""Links without namespaces: on loopback, connections go through relays that delay and pace.

For systems and users that may make no network namespace. All devices share 127.0.0.1, so each
has a port of its own, and each pair a relay. TCP stays unaware of the link: nothing is lost, and
a connection is made at once. The links' clocks and their model are the forwarder's.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from bench.net.forwarder import LinkClock
from bench.net.spec import Link, LinkError, Topology
from tpirt.transport.tickets import PORT_OFFSET

HOST = "127.0.0.1"
_CHUNK_BYTES = (1448, 1 << 16)
_CHUNK_S = 1e-3  # of a link's time at most: what one chunk holds up, or comes at once
_HELD_BYTES = 1_500_000  # between two sockets at most
_WAKING_S = 60e-6  # how late a sleeping thread wakes, at first; learned


@dataclass
class _Path:
    """The links from one device to another, as they are now."""

    clocks: list[LinkClock]
    lock: threading.Lock  # one for all paths: they share links
    nbytes: int = 0

    @property
    def chunk_bytes(self) -> int:
        """How much to carry at once."""
        low, high = _CHUNK_BYTES
        slowest = max((clock.s_per_byte for clock in self.clocks), default=0.0)
        return max(low, int(min(high, _CHUNK_S / slowest if slowest else high)))

    def due(self, nbytes: int) -> float:
        """Send bytes that are there now; returns when they will be at the other end."""
        with self.lock:
            first = last = time.monotonic()
            self.nbytes += nbytes
            for clock in self.clocks:
                first, last = clock.cross(nbytes, first, last)
            return last


@dataclass
class _Pump:
    """Carries bytes one way, from a reading thread to a writing one."""

    source: socket.socket
    target: socket.socket
    path: _Path
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    held: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def start(self) -> None:
        for work in (self._read, self._write):
            threading.Thread(target=work, name="relay", daemon=True).start()

    def _read(self) -> None:
        data = b"more"
        while data:
            try:
                data = self.source.recv(self.path.chunk_bytes)
            except OSError:
                data = b""
            due = self.path.due(len(data))
            with self.changed:
                self.changed.wait_for(lambda: self.held < _HELD_BYTES)
                self.held += len(data)
                self.queue.append((due, data))
                self.changed.notify_all()

    def _write(self) -> None:
        waking = _WAKING_S
        data = b"more"
        while data:
            with self.changed:
                self.changed.wait_for(lambda: self.queue)
                due, data = self.queue.popleft()
            left = due - waking - time.monotonic()
            if left > 0:
                time.sleep(left)
                waking = max(0.0, waking + min(time.monotonic() - due, 1e-3) / 16)
            with contextlib.suppress(OSError):  # the reader is gone: so will the writer be soon
                if data:
                    self.target.sendall(data)
                else:
                    self.target.shutdown(socket.SHUT_WR)
            with self.changed:
                self.held -= len(data)
                self.changed.notify_all()


class LoopbackBackend:
    """No links at all: the devices' ports on this machine, as what links are compared with."""

    name = "loopback, no links"

    def __init__(self, devices: int):
        self.ports = [_free_port() for _ in range(devices)]

    def change(self, topology: Topology) -> None:
        """Accept links that neither delay nor pace.

        Raises:
            LinkError: there are others.
        """
        for link in topology.all_links():
            if link != Link():
                raise LinkError(f"{self.name}: cannot be {link}")

    def close(self) -> None:
        """Do nothing: nothing was made."""


class RelayBackend:
    """Relays between the ports of devices on this machine."""

    name = "TCP relays on loopback"

    def __init__(self, devices: int):
        """Begin without any link; see :meth:`change`."""
        self.ports = [_free_port() for _ in range(devices)]
        self._lock = threading.Lock()
        every = range(devices)
        self._paths = {(i, j): _Path([], self._lock) for i in every for j in every if i != j}
        self._routes: dict[tuple[int, int, int], int] = {}
        self._sockets: list[socket.socket] = []

    def change(self, topology: Topology) -> None:
        """Have these links from now on.

        Raises:
            LinkError: they lose packets, or leave out a pair: there are no packets here.
        """
        for link in topology.all_links():
            if link.loss_percent or link.reorder or link.flip_percent or link.replay_percent:
                raise LinkError(
                    f"{self.name} lose, reorder and change nothing: that needs namespaces"
                )
        if len(list(topology.routes())) < len(self._paths):
            raise LinkError(f"{self.name} join all devices: `none` needs namespaces")
        up, down = map(_clock, topology.up), map(_clock, topology.down)
        ways = list(up), list(down)
        with self._lock:
            for (source, target), path in self._paths.items():
                own = topology.pairs.get((source, target))
                both = [ways[0][source], ways[1][target]]
                path.clocks = [_clock(own)] if own else both

    def route(self, source: int, target: int, port: int) -> int:
        """The port at which ``source`` reaches ``port`` of ``target``.

        Behind it lies, as far away as at the target itself, that of connections beside gRPC's.
        """
        key = source, target, port
        if key not in self._routes:
            servers = adjoining_servers()
            self._sockets += servers
            self._routes[key] = servers[0].getsockname()[1]
            for server, offset in zip(servers, (0, PORT_OFFSET), strict=True):
                threading.Thread(
                    target=self._accept, args=(server, source, target, port + offset), daemon=True
                ).start()
        return self._routes[key]

    def traffic(self, device: int) -> tuple[int, int]:
        """Bytes that a device has sent and received so far."""
        with self._lock:
            sent = sum(path.nbytes for (i, _), path in self._paths.items() if i == device)
            received = sum(path.nbytes for (_, j), path in self._paths.items() if j == device)
        return sent, received

    def close(self) -> None:
        """Close every connection; the threads end with them."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept or recv
            each.close()

    def _accept(self, server: socket.socket, source: int, target: int, port: int) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((HOST, port))
            except OSError:
                near.close()  # nobody listens there
                continue
            self._sockets += near, far
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Pump(near, far, self._paths[source, target]).start()
            _Pump(far, near, self._paths[target, source]).start()


def _clock(link: Link | None) -> LinkClock:
    link = link or Link()
    s_per_byte = 8e-6 / (link.rate_mbit or math.inf)
    return LinkClock(link.latency_ms / 1e3, link.jitter_ms / 1e3, s_per_byte, 0.0, False)


def adjoining_servers() -> list[socket.socket]:
    """Two that listen on loopback, as far apart as a peer's ports."""
    while True:
        first = socket.create_server((HOST, 0))
        with contextlib.suppress(OSError, OverflowError):
            second = (HOST, first.getsockname()[1] + PORT_OFFSET)
            return [first, socket.create_server(second)]
        first.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
