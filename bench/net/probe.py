"""Measuring links: what was built must be what was asked for.

Through namespaces, small UDP packets are timed from the sender's clock to the time at which the
receiver's kernel took them in (all namespaces share the clock): each direction by itself, and no
program's waking up is part of it. The rate is the slope of a short burst of packets; where this
machine is too slow to send packets of wire size that fast, of a TCP stream. Relays are measured
by round trips and streams.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.net.namespace import address
from bench.net.spec import LinkError, Topology
from bench.net.stream import opened_stream, round_trip_s, stream_mbit, window_bytes

Inside = Callable[[Callable[[], Any]], Any]  # calls something on a device's network
Route = Callable[[int, int, int], int]  # the port by which one device reaches another's port

TOLERANCE = 0.10
EXACT_TO_MS = 0.1  # no clock and no kernel is better than this on every machine
STREAMS_EXACT_TO_MS = 0.25  # nor are programs that have to wake up, as relays and their probes
_RELAY_ALONE_MS = 1.0  # where no latency is asked for, a relay's own waking up is all there is
_PROBES = 21
_PROBES_OF_JITTER = 81  # a median of so many is good to a tenth of the jitter
_GAP_S = 3e-4
_BURST_S = 5e-3
_BURST_JITTERS = 20  # a burst is to be long beside the jitter
_BURST_PACKETS = (12, 900)
_BURSTS = 3
_GOOD_ENOUGH = 0.02
_CALL_PACKETS = 45
_PAYLOAD = 1400
_WIRE_BITS = (_PAYLOAD + 20 + 8 + 14) * 8  # IPv4, UDP, Ethernet take their time too
_STREAM_WIRE = 1514 / 1448  # of a full TCP segment: with headers, without
_PATIENCE_S = 0.1
_SO_TIMESTAMPNS = 35  # Linux: asm-generic/socket.h, linux/udp.h
_SO_RCVBUFFORCE = 33
_UDP_SEGMENT = 103


@dataclass(frozen=True)
class Measured:
    """One direction of one pair: asked for, and found; rates None are unbounded."""

    source: int
    target: int
    asked_ms: float
    found_ms: float
    asked_mbit: float | None
    found_mbit: float | None
    lost: int = 0
    exact_to_ms: float = EXACT_TO_MS

    def faults(self) -> Iterator[str]:
        """What is further off than it may be."""
        allowed_ms = max(self.exact_to_ms, TOLERANCE * self.asked_ms)
        if not abs(self.found_ms - self.asked_ms) <= allowed_ms:
            yield (
                f"one-way latency {self.found_ms:.3f} ms instead of {self.asked_ms:g} ms "
                f"(allowed: {TOLERANCE:.0%}, or {self.exact_to_ms:g} ms)"
            )
        if self.asked_mbit is not None and self.found_mbit is not None:
            off = abs(self.found_mbit / self.asked_mbit - 1)
            if not off <= TOLERANCE:
                yield (
                    f"rate {self.found_mbit:.1f} Mbit/s instead of {self.asked_mbit:g} Mbit/s "
                    f"(allowed: {TOLERANCE:.0%})"
                )


def check(measured: Sequence[Measured]) -> None:
    """Refuse links that are not what was asked for.

    Raises:
        LinkError: names the pair that is off, and by how much.
    """
    for pair in measured:
        for fault in pair.faults():
            raise LinkError(
                f"the emulated link from device {pair.source} to {pair.target} is not what was "
                f"asked for: {fault}, so nothing is measured over it; is the machine busy?"
            )


def measure_packets(topology: Topology, inside: Sequence[Inside]) -> list[Measured]:
    """Measure every pair that has a way, through namespaces; ``inside[i]`` is device i's."""
    with ExitStack() as stack:
        sockets = []
        for device, run in enumerate(inside):
            sockets.append(run(partial(_probe_socket, device)))
            stack.callback(sockets[-1].close)
        delays = _one_way_delays(topology, sockets)
        found = []
        for source, target in topology.routes():
            times = delays[source, target]
            asked_mbit, rate = topology.rate_mbit(source, target), None
            if asked_mbit is not None:
                burst = _Burst(topology, source, target)
                rate = burst.best_mbit(sockets[source], sockets[target])
                if rate < asked_mbit * (1 - TOLERANCE) and not burst.lossy:
                    rate = _stream_rate(inside[source], inside[target], target, burst)
            latency = statistics.median(times) * 1e3 if times else math.nan
            asked_ms, lost = topology.latency_ms(source, target), _probes(topology) - len(times)
            found.append(Measured(source, target, asked_ms, latency, asked_mbit, rate, lost))
        return found


def measure_streams(topology: Topology, route: Route) -> list[Measured]:
    """Measure every pair through relays on loopback; latency is its part of a round trip."""
    found = []
    for source, target in topology.routes():
        there, back = topology.latency_ms(source, target), topology.latency_ms(target, source)
        asked_mbit, rate = topology.rate_mbit(source, target), None

        def connect(port: int, source: int = source, target: int = target) -> socket.socket:
            return socket.create_connection(("127.0.0.1", route(source, target, port)))

        with opened_stream(lambda: socket.create_server(("127.0.0.1", 0)), connect) as stream:
            trips = [round_trip_s(stream) for _ in range(_PROBES)]
            if asked_mbit is not None:
                rate = stream_mbit(stream, asked_mbit, there + back)
        part = there / (there + back) if there + back else 0.5
        latency = statistics.median(trips) * 1e3 * part
        found.append(
            Measured(
                source,
                target,
                there,
                latency,
                asked_mbit,
                rate,
                exact_to_ms=STREAMS_EXACT_TO_MS if there else _RELAY_ALONE_MS,
            )
        )
    return found


def _probe_socket(device: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    probe.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    probe.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 22)
    probe.bind((address(device), 0))
    return probe


def _probes(topology: Topology) -> int:
    jitter = any(link.jitter_ms for link in topology.all_links())
    return _PROBES_OF_JITTER if jitter else _PROBES


def _one_way_delays(
    topology: Topology, sockets: Sequence[socket.socket]
) -> dict[tuple[int, int], list[float]]:
    """Seconds from each source to each target, of the probes that came."""
    delays: dict[tuple[int, int], list[float]] = {pair: [] for pair in topology.routes()}
    sent: dict[int, tuple[int, int, int]] = {}
    numbers = itertools.count()

    def collect() -> None:
        for receiver in sockets:
            for data, came in _received(receiver):
                known = sent.pop(int.from_bytes(data, "big"), None)
                if known is not None:
                    source, target, went = known
                    delays[source, target].append((came - went) / 1e9)

    # Far enough apart that one probe's delay, jitter included, does not hold up the next.
    jitter_ms = max((topology.jitter_ms(*pair) for pair in delays), default=0.0)
    gap = _GAP_S + 2e-3 * jitter_ms
    for turn in range(_probes(topology) + 1):
        for shift in range(1, len(sockets)):
            for source, probe in enumerate(sockets):
                target = (source + shift) % len(sockets)
                if (source, target) in delays:
                    number, went = next(numbers), time.time_ns()
                    if turn:  # the first round finds the way; it does not count
                        sent[number] = (source, target, went)
                    probe.sendto(number.to_bytes(8, "big"), sockets[target].getsockname())
            time.sleep(gap)
            collect()
    longest_ms = max((topology.latency_ms(*pair) for pair in delays), default=0.0)
    deadline = time.monotonic() + _PATIENCE_S + 2 * longest_ms / 1e3
    while sent and time.monotonic() < deadline:
        time.sleep(1e-3)
        collect()
    return delays


class _Burst:
    """A burst of packets over one pair, as its links ask for."""

    def __init__(self, topology: Topology, source: int, target: int):
        path = topology.path(source, target)
        self.latency_ms = topology.latency_ms(source, target)
        self.lossy = any(link.loss_percent for link in path)
        self.rate_mbit = topology.rate_mbit(source, target) or math.inf
        jitter_s = topology.jitter_ms(source, target) / 1e3
        low, high = _BURST_PACKETS
        seconds = max(_BURST_S, _BURST_JITTERS * jitter_s)
        self._count = min(high, max(low, int(self.rate_mbit * 1e6 * seconds / _WIRE_BITS)))

    def best_mbit(self, source: socket.socket, target: socket.socket) -> float:
        """The best of some bursts: a sender that is held up makes a link look slower only."""
        best = 0.0
        for number in range(1, _BURSTS + 1):
            rate = self._mbit(source, target, number)
            best = rate if math.isnan(best) else max(best, rate)
            if best > self.rate_mbit * (1 - _GOOD_ENOUGH):
                break
        return best

    def _mbit(self, source: socket.socket, target: socket.socket, number: int) -> float:
        # Many packets a call: a forwarder that is woken by each would hold up their sender.
        segments = (socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("H", _PAYLOAD))
        for start in range(0, self._count, _CALL_PACKETS):
            part = bytes([number]) * (_PAYLOAD * min(_CALL_PACKETS, self._count - start))
            source.sendmsg([part], [segments], 0, target.getsockname())
        patience_s = _PATIENCE_S + 2 * self.latency_ms / 1e3
        deadline = time.monotonic() + patience_s + self._count * _WIRE_BITS * 1e-6 / self.rate_mbit
        times: list[int] = []
        while len(times) < self._count and time.monotonic() < deadline:
            time.sleep(1e-3)
            times += [came for data, came in _received(target) if data[0] == number]
        steady = times[len(times) // 4 :]  # the first ones' jitter is not yet that of all
        if len(steady) < 2 or steady[0] == steady[-1]:
            return 0.0
        return _WIRE_BITS * 1e3 / statistics.linear_regression(range(len(steady)), steady).slope


def _stream_rate(source: Inside, target: Inside, device: int, burst: _Burst) -> float:
    """Mbit/s on the wire of a TCP stream between two namespaces."""

    def connect(port: int) -> socket.socket:
        connected: socket.socket = source(lambda: socket.create_connection((address(device), port)))
        return connected

    def listen() -> socket.socket:
        server = socket.create_server((address(device), 0))
        window = window_bytes(burst.rate_mbit, 2 * burst.latency_ms)
        server.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, window)  # the kernel doubles it
        return server

    with opened_stream(lambda: target(listen), connect) as stream:
        return stream_mbit(stream, burst.rate_mbit, 2 * burst.latency_ms) * _STREAM_WIRE


def _received(probe: socket.socket) -> Iterator[tuple[bytes, int]]:
    """What lies in a socket, and when the kernel took it in, ns since the epoch."""
    with contextlib.suppress(BlockingIOError):
        while True:
            data, ancillary, _, _ = probe.recvmsg(2048, 128)
            seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
            yield data, seconds * 1_000_000_000 + nanoseconds
