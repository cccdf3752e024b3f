"""How long a message takes over a link, and how many bytes a second: measured when ranks meet."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tpirt.errors import PeerLostError, TransportError
from tpirt.transport.base import Channel
from tpirt.transport.codec import Frame
from tpirt.transport.pb import tpirt_pb2 as pb

_ROUND_TRIPS = 12
_PAYLOAD = bytes(256 << 10)  # its serialization outweighs the jitter of most links
_PAYLOADS = 4  # a connection begins slowly: the first ones open its congestion window
_PATIENCE_S = 0.5  # on a slow link one payload says enough


@dataclass(frozen=True)
class LinkQuality:
    """What a link is good for.

    Attributes:
        latency_s: one way for a small message, our own work on it included.
        bytes_per_s: of a large one, beyond that latency.
    """

    latency_s: float
    bytes_per_s: float


async def measure(channel: Channel, timeout_s: float) -> LinkQuality:
    """Measure a link whose other end answers probes: some dozen round trips and up to 1 MiB.

    Raises:
        PeerLostError: the other side is gone or silent.
        TransportError: it said something else.
    """
    trips = [await round_trip(channel, number, b"", timeout_s) for number in range(_ROUND_TRIPS)]
    shortest = min(trips)
    best = float("inf")
    began = time.perf_counter()
    for number in range(_ROUND_TRIPS, _ROUND_TRIPS + _PAYLOADS):
        best = min(best, await round_trip(channel, number, _PAYLOAD, timeout_s))
        if time.perf_counter() - began > _PATIENCE_S:
            break
    return LinkQuality(shortest / 2, len(_PAYLOAD) / max(best - shortest, 1e-6))


async def send_last(channel: Channel) -> None:
    """Tell the other end that no further probe comes."""
    await channel.send(Frame(pb.FrameHeader(probe=pb.Probe(last=True))))


async def answer(channel: Channel, frame: Frame) -> None:
    """Answer one probe.

    Raises:
        TransportError: ``frame`` is something else.
    """
    if frame.kind != "probe":
        raise TransportError(f"peer {channel.peer_id}: expected a probe, got {frame.kind}")
    number = frame.header.probe.number
    await channel.send(Frame(pb.FrameHeader(probe=pb.Probe(number=number))))


async def answer_all(channel: Channel, timeout_s: float) -> None:
    """Answer probes until the last.

    Raises:
        PeerLostError: the other side is gone or silent.
        TransportError: it said something else.
    """
    while True:
        frame = await channel.recv(timeout_s)
        if frame.kind == "probe" and frame.header.probe.last:
            return
        await answer(channel, frame)


async def round_trip(channel: Channel, number: int, payload: bytes, timeout_s: float) -> float:
    """Send one probe and wait for its answer; returns the seconds it took.

    Raises:
        PeerLostError: the other side is gone or silent.
        TransportError: it said something else.
    """
    began = time.perf_counter()
    await channel.send(Frame(pb.FrameHeader(probe=pb.Probe(number=number)), payload))
    frame = await channel.recv(timeout_s)
    if frame.kind == "error":
        raise PeerLostError(f"peer {channel.peer_id}: {frame.header.error.message}")
    if frame.kind != "probe" or frame.header.probe.number != number:
        raise TransportError(
            f"peer {channel.peer_id}: expected the answer to probe {number}, got {frame.kind}"
        )
    return time.perf_counter() - began
