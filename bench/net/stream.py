"""One TCP connection whose other end answers: round trips and rates as programs see them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_STREAM_S = 0.05
_BYTES = (1 << 16, 1 << 25)
_QUEUED_BYTES = 1 << 19
_PATIENCE_S = 20.0


@contextmanager
def opened_stream(
    listen: Callable[[], socket.socket], connect: Callable[[int], socket.socket]
) -> Iterator[socket.socket]:
    """Connect to a thread that takes what it is sent, and says how long the second half took.

    Args:
        listen: makes the listening socket, its receive buffer set.
        connect: connects to its port.
    """
    with listen() as server:
        thread = threading.Thread(target=_serve, args=(server,), daemon=True)
        thread.start()
        try:
            with connect(server.getsockname()[1]) as stream:
                stream.settimeout(_PATIENCE_S)
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield stream
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes a thread that nobody connected to
            thread.join()


def round_trip_s(stream: socket.socket) -> float:
    """Seconds that a few bytes there and back take."""
    started = time.monotonic()
    _exchange(stream, 2)
    return time.monotonic() - started


def window_bytes(rate_mbit: float, round_trip_ms: float) -> int:
    """What may be under way: as much as fills a link, and not so much that its queue overflows."""
    return int(rate_mbit * round_trip_ms * 1e3 / 8) + _QUEUED_BYTES


def stream_mbit(stream: socket.socket, asked_mbit: float, round_trip_ms: float) -> float:
    """Mbit/s of payload in the second half of a stream, when TCP has found its pace."""
    low, high = _BYTES
    seconds = _STREAM_S + 8 * round_trip_ms / 1e3
    size = min(high, max(low, int(asked_mbit * 1e6 * seconds / 8)))
    return (size - size // 2) * 8e-6 / _exchange(stream, size)


def _exchange(stream: socket.socket, size: int) -> float:
    stream.sendall(size.to_bytes(4, "big") + bytes(size))
    (seconds,) = struct.unpack("d", stream.recv(8, socket.MSG_WAITALL))
    return float(seconds)


def _serve(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        stream, _ = server.accept()
        with stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while size := int.from_bytes(stream.recv(4, socket.MSG_WAITALL), "big"):
                half = _receive(stream, size // 2)
                end = _receive(stream, size - size // 2)
                stream.sendall(struct.pack("d", end - half))


def _receive(stream: socket.socket, size: int) -> float:
    """Take ``size`` bytes; returns when the last came."""
    while size > 0:
        data = stream.recv(min(size, 1 << 16))
        if not data:
            raise ConnectionError
        size -= len(data)
    return time.monotonic()
