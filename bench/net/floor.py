"""The least time that links allow for given messages: latency, and what each link must carry.

An algorithm is a list of hops, each a list of messages. A rank sends its messages of a hop, in the
order in which they stand there, as soon as it has got all that the hops before sent to it. This is
played through with ideal ranks, which take no time for anything, over links that behave as the
emulated ones. Headers and acknowledgements are left out. Ranks that are ahead of others stay so:
where sums follow each other, one rank's serialization can be under another one's latency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.net.forwarder import LinkClock
from bench.net.spec import Link, Topology, uniform

Message = tuple[int, int, float]  # source, target, bytes
Hop = list[Message]


def all_reduce_hops(algorithm: str, world_size: int, nbytes: float) -> list[Hop]:
    """What one allreduce of ``nbytes`` sends.

    Raises:
        KeyError: an algorithm that is not known here.
    """
    ranks, others = range(world_size), range(1, world_size)
    share = nbytes / world_size

    def exchange(size: float) -> Hop:
        # Each sends to its neighbour first: to the same one first, its link would be held up.
        return [(rank, (rank + shift) % world_size, size) for shift in others for rank in ranks]

    gather: Hop = [(rank, 0, nbytes) for rank in others]
    scatter: Hop = [(0, rank, nbytes) for rank in others]
    return {
        "star": [gather, scatter],
        "one-shot": [exchange(nbytes)],
        "two-shot": [exchange(share), exchange(share)],
    }[algorithm]


def step_hops(
    algorithm: str,
    world_size: int,
    layers: int,
    *,
    hidden_bytes: float,
    sum_bytes: float,
    last_bytes: float,
    spread: bool = False,
) -> list[Hop]:
    """What one step sends: the master's hidden states, a sum after each block, the last to it.

    The last layer's two sums are of ``last_bytes``: of the tokens whose results are wanted. With
    ``spread`` each worker gets a share of the hidden states, and passes it on to the others.
    """
    if world_size == 1:
        return []
    workers = range(1, world_size)
    hidden: list[Hop] = [[(0, rank, hidden_bytes) for rank in workers]]
    if spread:
        share = hidden_bytes / len(workers)
        passed = [(a, b, share) for a in workers for b in workers if a != b]
        hidden = [[(0, rank, share) for rank in workers], passed]
    return [
        *hidden,
        *all_reduce_hops(algorithm, world_size, sum_bytes) * (2 * layers - 2),
        *all_reduce_hops(algorithm, world_size, last_bytes),
        [(rank, 0, last_bytes) for rank in workers],
    ]


def messages(hops: Sequence[Hop]) -> int:
    """How many messages are sent in all."""
    return sum(map(len, hops))


def latencies(world_size: int, hops: Sequence[Hop]) -> int:
    """How many latencies lie one after another before rank 0 has everything."""
    return round(finish_ms(uniform(Link(1.0), world_size), hops)[0])


def finish_ms(topology: Topology, hops: Sequence[Hop]) -> list[float]:
    """When each rank has got all that is sent to it; all begin at 0."""
    up, down = ([_clock(link) for link in links] for links in (topology.up, topology.down))
    own = {pair: _clock(link) for pair, link in topology.pairs.items()}
    ready = [0.0] * topology.devices
    for hop in hops:
        after = list(ready)
        at_router = []
        for source, target, nbytes in sorted(hop, key=lambda message: ready[message[0]]):
            clock = own.get((source, target), up[source])
            first, last = clock.cross(nbytes, ready[source], ready[source])
            if (source, target) in own:
                after[target] = max(after[target], last)
            else:
                at_router.append((first, last, target, nbytes))
        for first, last, target, nbytes in sorted(at_router):
            _, last = down[target].cross(nbytes, first, last)
            after[target] = max(after[target], last)
        ready = after
    return ready


def _clock(link: Link | None) -> LinkClock:
    """A link without chance, in milliseconds."""
    link = link or Link()
    return LinkClock(link.latency_ms, 0.0, 8e-3 / (link.rate_mbit or math.inf), 0.0, False)
