"""What goes over the wire between two processes."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from bench.net.relay import adjoining_servers
from tpirt.transport.tickets import PORT_OFFSET


class Tap:
    """A proxy on loopback, of both of a peer's ports, that keeps every byte of both directions."""

    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._listeners = adjoining_servers()
        self.address = f"127.0.0.1:{self._listeners[0].getsockname()[1]}"
        self.there = bytearray()  # from the master to the worker
        self.back = bytearray()
        self.taken = 0  # connections
        self._threads = [
            threading.Thread(target=self._serve, args=(listener, (host, int(port) + offset)))
            for listener, offset in zip(self._listeners, (0, PORT_OFFSET), strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, listener: socket.socket, target: tuple[str, int]) -> None:
        pumps = []
        with suppress(OSError):
            while True:
                master, _ = listener.accept()
                worker = socket.create_connection(target)
                self.taken += 1
                for source, sink, kept in (
                    (master, worker, self.there),
                    (worker, master, self.back),
                ):
                    pumps.append(threading.Thread(target=self._pump, args=(source, sink, kept)))
                    pumps[-1].start()
        for pump in pumps:
            pump.join()

    def _pump(self, source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with source, suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for listener, thread in zip(self._listeners, self._threads, strict=True):
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(10)
            assert not thread.is_alive()
