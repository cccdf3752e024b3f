"""Every packet that a device sends and receives."""

from __future__ import annotations

import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from bench.net.namespace import INTERFACE
from tests.support.lan import LanDevice

_ALL, _IPV4, _IPV6, _ARP = 0x0003, 0x0800, 0x86DD, 0x0806
_TCP, _UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
_SYN, _ACK = 0x02, 0x10
_IPV6_OPTIONS = 0  # before MLD's reports
_LARGEST = 1 << 17  # segments that are not yet cut into packets
_BUFFER_BYTES = 256 << 20


class Capture:
    """What was on the wire.

    Attributes:
        kinds: protocols, with the port that was called where there is one.
        streams: what TCP carried, in each direction of each connection.
        mdns: what was multicast.
    """

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.streams: defaultdict[tuple[bytes, bytes], bytearray] = defaultdict(bytearray)
        self.mdns = bytearray()

    def add(self, packet: bytes) -> None:
        """Account for an Ethernet packet."""
        (kind,) = struct.unpack_from(">H", packet, 12)
        if kind == _IPV4:
            size, protocol = 4 * (packet[14] & 15), packet[23]
            whole = packet[14 : 14 + struct.unpack_from(">H", packet, 16)[0]]
            self._add_ip(protocol, whole[12:20], whole[size:])
        elif kind == _IPV6:
            protocol, whole = packet[20], packet[14 : 54 + struct.unpack_from(">H", packet, 18)[0]]
            self._add_ip(protocol, whole[8:40], whole[40:])
        else:
            self.kinds.add("ARP" if kind == _ARP else f"Ethernet {kind:#06x}")

    def _add_ip(self, protocol: int, addresses: bytes, segment: bytes) -> None:
        if protocol not in (_TCP, _UDP):
            names = {1: "ICMP", 2: "IGMP", 58: "ICMPv6", _IPV6_OPTIONS: "ICMPv6"}
            self.kinds.add(names.get(protocol, f"IP {protocol}"))
            return
        _, port = struct.unpack_from(">HH", segment)
        if protocol == _UDP:
            self.kinds.add(f"UDP {port}")
            self.mdns += segment[8:]
            return
        if segment[13] & (_SYN | _ACK) == _SYN:
            self.kinds.add(f"TCP {port}")
        self.streams[addresses, segment[:4]] += segment[4 * (segment[12] >> 4) :]


@contextmanager
def capturing(device: LanDevice) -> Iterator[Capture]:
    """Keep a device's packets until the block ends."""

    def opened() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        raw.setsockopt(socket.SOL_SOCKET, 33, _BUFFER_BYTES)  # SO_RCVBUFFORCE
        raw.bind((INTERFACE, 0))
        raw.settimeout(0.1)
        return raw

    capture, ended = Capture(), threading.Event()
    with device.namespace.run(opened) as raw:

        def read() -> None:
            while True:
                try:
                    capture.add(raw.recv(_LARGEST))
                except TimeoutError:
                    if ended.is_set():
                        return

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield capture
        finally:
            ended.set()
            thread.join()
            packets, lost = struct.unpack("II", raw.getsockopt(263, 6, 8))  # PACKET_STATISTICS
            assert packets > 0
            assert lost == 0
