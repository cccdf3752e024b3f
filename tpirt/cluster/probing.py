"""How long a message takes over a link, and how many bytes a second it carries."""

from __future__ import annotations

import time

from tpirt.protocol.link import Link
from tpirt.protocol.messages import LinkQuality, Probe

_ROUND_TRIPS = 12
_PAYLOAD = bytes(256 << 10)  # its serialization outweighs the jitter of most links
_PAYLOADS = 4  # a connection begins slowly: the first ones open its congestion window
_PATIENCE_S = 0.5  # on a slow link one payload says enough


async def measure(link: Link) -> LinkQuality:
    """Measure a link: a dozen round trips and up to 1 MiB. The other end answers by itself.

    Raises:
        PeerLostError, TransportError: the link is gone.
    """
    shortest = min([await _round_trip(link, b"") for _ in range(_ROUND_TRIPS)])
    best = float("inf")
    began = time.perf_counter()
    for _ in range(_PAYLOADS):
        best = min(best, await _round_trip(link, _PAYLOAD))
        if time.perf_counter() - began > _PATIENCE_S:
            break
    return LinkQuality(shortest / 2, len(_PAYLOAD) / max(best - shortest, 1e-6))


async def _round_trip(link: Link, payload: bytes) -> float:
    """Seconds from sending a probe until its answer."""
    began = time.perf_counter()
    await link.request(Probe(), payload)
    return time.perf_counter() - began
