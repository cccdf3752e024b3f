"""How long a message takes over a link, and how many bytes a second it carries."""

from __future__ import annotations

import time

from tpirt.protocol.link import Link
from tpirt.protocol.messages import LinkQuality, Probe

_ROUND_TRIPS = 12
# The first payload keeps slow links short: 0.3 s at 1 Mbit/s. The serialization of the others
# outweighs the jitter of most links; more than one, for a connection begins slowly: the first ones
# open its congestion window.
_PAYLOADS = (bytes(32 << 10), *[bytes(256 << 10)] * 4)
_SLOW_S = 0.1  # a payload that takes so long, and many times the latency, says enough
_SLOW_ROUND_TRIPS = 4


async def measure(link: Link) -> LinkQuality:
    """Measure a link: a dozen round trips and up to 1 MiB. The other end answers by itself.

    Raises:
        PeerLostError, TransportError: the link is gone.
    """
    shortest = min([await _round_trip(link, b"") for _ in range(_ROUND_TRIPS)])
    fastest = 0.0
    for payload in _PAYLOADS:
        took = max(await _round_trip(link, payload) - shortest, 1e-6)
        fastest = max(fastest, len(payload) / took)
        if took > max(_SLOW_S, _SLOW_ROUND_TRIPS * shortest):
            break
    return LinkQuality(shortest / 2, fastest)


async def _round_trip(link: Link, payload: bytes) -> float:
    """Seconds from sending a probe until its answer."""
    began = time.perf_counter()
    await link.request(Probe(), payload)
    return time.perf_counter() - began
