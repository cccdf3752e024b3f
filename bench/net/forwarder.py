"""What ``forwarder.c`` does, for machines without a C compiler: slower, and less exact.

    python -m bench.net.forwarder FD...

Orders, answers and the model of a link are described there.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import random
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass

_HEADER = 10  # struct virtio_net_hdr
_ETHERNET = 14
_QUEUE_BYTES = 1_500_000
_BATCH = 64
_OUTLIER_S = 1e-3
_BUFFER = _HEADER + 65_536


@dataclass(slots=True)
class LinkClock:
    """One direction of a link and when it is busy until; times of any clock and unit, here s."""

    delay_s: float
    jitter_s: float
    s_per_byte: float
    loss: float
    reorder: bool
    flip: float = 0.0
    replay: float = 0.0
    free_at: float = 0.0  # when it has sent everything given to it
    earlier: bytes = b""  # what a packet carried that crossed it

    def is_full(self, at: float) -> bool:
        """Whether all that may wait for it does."""
        return self.free_at - at > _QUEUE_BYTES * self.s_per_byte > 0

    def loses(self) -> bool:
        """Whether it loses the packet at hand."""
        return self.loss > 0 and random.random() < self.loss

    def tampered(self, data: bytes) -> bytes:
        """A packet, of which a bit is flipped or its bytes are an earlier one's, if it is to be."""
        tcp = _HEADER + 4 * (data[_HEADER] & 15)
        if not (self.flip or self.replay) or data[_HEADER + 9] != socket.IPPROTO_TCP:
            return data
        head, carried = data[: (at := tcp + 4 * (data[tcp + 12] >> 4))], bytearray(data[at:])
        if carried and random.random() < self.flip:
            carried[random.randrange(len(carried))] ^= 1 << random.randrange(8)
        if self.earlier and random.random() < self.replay:
            earlier = self.earlier[: len(carried)]
            carried[: len(earlier)] = earlier
        elif carried:
            self.earlier = bytes(carried)
        return head + carried

    def cross(self, wire_bytes: float, first: float, last: float) -> tuple[float, float]:
        """When first and last bit leave it that come at ``first`` and ``last``."""
        start = max(first, self.free_at)
        self.free_at = start + wire_bytes * self.s_per_byte
        delay = self.delay_s + self.jitter_s * (2 * random.random() - 1)
        return start + delay, max(last, self.free_at) + delay


@dataclass(slots=True)
class _Packet:
    data: bytes
    wire_bytes: int
    source: int
    target: int
    second: int  # the link it still has to cross, or -1
    last_bit: float = 0.0  # when it is at the router
    reorder: bool = False  # it may overtake others between the same two devices


class _Agenda:
    """Packets with the time at which something is to be done with each."""

    def __init__(self) -> None:
        self.last: dict[tuple[int, int], float] = {}  # the latest from and to each device
        self._heap: list[tuple[float, int, _Packet]] = []
        self._order = itertools.count()  # equal times: first come, first served

    def add(self, packet: _Packet, due: float) -> float:
        """Set it for ``due``, or later if its source sent others there before; returns when."""
        pair = packet.source, packet.target
        if not packet.reorder:
            due = max(due, self.last.get(pair, due))
        self.last[pair] = due
        heapq.heappush(self._heap, (due, next(self._order), packet))
        return due

    def next(self) -> float:
        """The first time; infinity if there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def pop(self) -> tuple[float, _Packet]:
        """The first time and its packet."""
        due, _, packet = heapq.heappop(self._heap)
        return due, packet


class Forwarder:
    """Forwards between the TUN devices ``fds``."""

    def __init__(self, fds: list[int]):
        self._fds = fds
        self._links: list[LinkClock] = []
        self._routes: list[list[tuple[int, int]]] = []
        self._least_second_delay = 0.0
        self._arrivals = _Agenda()  # first bits at the router
        self._deliveries = _Agenda()  # last bits at the target
        self._oversleep_s = 50e-6
        self._reset_stats()

    def serve(self) -> None:
        """Forward until standard input ends."""
        while True:
            due = self._next_due()
            left = None if due is None else max(0.0, due - self._oversleep_s - time.monotonic())
            ready, _, _ = select.select([*self._fds, 0], [], [], left)
            waking = self._oversleep_s if ready and left != 0.0 else 0.0
            if due is not None and left and not ready:
                late = min(time.monotonic() - due, _OUTLIER_S)
                self._oversleep_s = max(0.0, self._oversleep_s + late / 16)
            self._run_due()
            for fd in ready:
                if fd != 0:
                    self._take(self._fds.index(fd), waking)
                elif not self._obey():
                    return

    def _next_due(self) -> float | None:
        due = min(self._deliveries.next(), self._arrivals.next() + self._least_second_delay)
        return None if due == math.inf else due

    def _take(self, source: int, waking: float) -> None:
        for _ in range(_BATCH):
            try:
                packet = os.read(self._fds[source], _BUFFER)
            except BlockingIOError:
                return
            if len(packet) < _HEADER + 20 or packet[10] >> 4 != 4 or packet[26:29] != b"\n\0\0":
                continue
            target = packet[29] - 1
            if 0 <= target < len(self._fds) and self._routes:
                self._send(packet, source, target, time.monotonic() - waking)
            self._run_due()

    def _send(self, data: bytes, source: int, target: int, first: float) -> None:
        link, second = self._routes[source][target]
        packet = _Packet(data, _wire_bytes(data), source, target, second)
        times = self._crossed(link, packet, first, first)
        if times is None:
            return
        packet.reorder = self._links[link].reorder or (second >= 0 and self._links[second].reorder)
        first, packet.last_bit = times
        if second < 0:
            self._deliveries.add(packet, packet.last_bit)
        else:
            packet.last_bit += self._arrivals.add(packet, first) - first

    def _crossed(
        self, number: int, packet: _Packet, first: float, last: float
    ) -> tuple[float, float] | None:
        """See :meth:`LinkClock.cross`; None if there is no such link, it is full, or it loses."""
        link = self._links[number] if number >= 0 else None
        if link is None or link.is_full(first) or link.loses():
            self._dropped += 1
            return None
        packet.data = link.tampered(packet.data)
        return link.cross(packet.wire_bytes, first, last)

    def _run_due(self) -> None:
        while True:
            now = time.monotonic()
            if self._arrivals.next() <= now:
                first, packet = self._arrivals.pop()
                times = self._crossed(packet.second, packet, first, packet.last_bit)
                if times is not None:
                    self._deliveries.add(packet, times[1])
            elif self._deliveries.next() <= now:
                due, packet = self._deliveries.pop()
                self._late.append(now - due)
                self._bytes += packet.wire_bytes
                try:
                    os.write(self._fds[packet.target], packet.data)
                except OSError:
                    self._dropped += 1
            else:
                return

    def _obey(self) -> bool:
        """Carry out one order; False when there will be no more."""
        # One byte after another would be slow, and a buffer could hide the next order.
        order = b""
        while not order.endswith(b"\n"):
            part = os.read(0, 1 << 16)
            if not part:
                return False
            order += part
        name, *numbers = order.decode().split()
        if name == "links":
            self._set_links(numbers)
            print("ok", flush=True)
        else:
            print(self._stats(), flush=True)
        return True

    def _set_links(self, numbers: list[str]) -> None:
        values = iter(numbers)
        self._links = [
            LinkClock(
                delay_s=float(next(values)) / 1e9,
                jitter_s=float(next(values)) / 1e9,
                s_per_byte=float(next(values)) / 1e9,
                loss=float(next(values)),
                reorder=next(values) != "0",
                flip=float(next(values)),
                replay=float(next(values)),
            )
            for _ in range(int(next(values)))
        ]
        every = range(len(self._fds))
        self._arrivals.last.clear()
        self._deliveries.last.clear()
        self._routes = [[(int(next(values)), int(next(values))) for _ in every] for _ in every]
        seconds = {second for row in self._routes for _, second in row if second >= 0}
        delays = (self._links[at].delay_s - self._links[at].jitter_s for at in seconds)
        self._least_second_delay = min(delays, default=0.0)

    def _stats(self) -> str:
        late = sorted(self._late) or [0.0]
        p50, p99 = late[len(late) // 2], late[len(late) * 99 // 100]
        lateness = (int(value * 1e9) for value in (p50, p99, late[-1]))
        text = " ".join(map(str, (len(self._late), self._bytes, self._dropped, *lateness)))
        self._reset_stats()
        return text

    def _reset_stats(self) -> None:
        self._late: list[float] = []
        self._bytes = 0
        self._dropped = 0


def _wire_bytes(packet: bytes) -> int:
    """What a packet, or a TCP segment that is still whole, takes on a wire."""
    kind: int
    header: int
    segment: int
    kind, header, segment = struct.unpack_from("=xBHH", packet)
    whole = len(packet) - _HEADER
    count = -(-(whole - header) // segment) if kind and segment and whole > header else 1
    return whole + (count - 1) * header + count * _ETHERNET


def main() -> None:
    """Serve with the highest priority that the system gives."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    Forwarder([int(fd) for fd in sys.argv[1:]]).serve()


if __name__ == "__main__":
    main()
