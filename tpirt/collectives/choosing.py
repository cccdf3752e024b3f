"""Which collective suits which message, by a cost model over measured links.

Symbols: R ranks, n bytes of a partial on the wire, L(i, j) one-way latency between ranks i and j
with our own work on a message in it, B(i) the rate of rank i's link (the best of its pairs, for
what a pair reaches is bounded by both ends), w the work of sending and taking messages.

    star      2 (max L(i, 0) + (R - 1) n / B(0)) + w
    direct    max L(i, j) + (R - 1) n / min B(i) + w
    two-shot  2 (max L(i, j) + (R - 1) / R n / min B(i)) + w

Incast is in the second terms: what several ranks send to one shares its link. The work w is that
of the busiest machine, c = 60 us for each message that a rank of it sends or takes, over the cores
that its ranks share, less what a hop's latency counts already: eight ranks on two cores are quicker
through the master, for the star has the fewest messages. What collectives really took corrects
the model, for each algorithm by a factor that follows the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tpirt.collectives.base import Algorithm
from tpirt.units import format_bytes

_LOOPBACK_BYTES_PER_S = 125e6  # the least that a busy machine gives itself
_MESSAGE_S = 60e-6  # c: a core's time to send or to take a message (bench.allreduce)
_WEIGHT = 0.2  # of the newest measurement in a factor
_BOUNDS = (0.25, 4.0)  # of a factor: one stalled token must not decide


@dataclass(frozen=True)
class Machine:
    """Ranks that share a machine's cores."""

    ranks: tuple[int, ...]
    cores: int


@dataclass(frozen=True)
class Topology:
    """The links of all pairs of ranks (i < j); ``complete`` if workers reach each other too.

    Ranks that no machine names have one of their own.
    """

    world_size: int
    latency_s: Mapping[tuple[int, int], float]
    bytes_per_s: Mapping[tuple[int, int], float]
    complete: bool
    machines: tuple[Machine, ...] = ()

    @property
    def on_loopback(self) -> bool:
        """Whether all ranks share a machine, and nothing else is between them.

        Devices that a machine emulates share it too; their links tell them apart.
        """
        together = any(len(machine.ranks) == self.world_size for machine in self.machines)
        slowest = min(self.bytes_per_s.values())
        return together and slowest > _LOOPBACK_BYTES_PER_S

    def slowest_hop_s(self) -> float:
        """max L(i, j)."""
        return max(self.latency_s.values())

    def master_hop_s(self) -> float:
        """max L(i, 0)."""
        return max(self.latency_s[0, rank] for rank in range(1, self.world_size))

    def rate(self, rank: int) -> float:
        """B(rank)."""
        return max(rate for pair, rate in self.bytes_per_s.items() if rank in pair)


def predict_s(algorithm: Algorithm, topology: Topology, nbytes: int) -> float:
    """Time of one allreduce after the model."""
    world = topology.world_size
    work = _work_s(algorithm, topology)
    if algorithm is Algorithm.STAR:
        moved = (world - 1) * nbytes / topology.rate(0)
        return 2 * (topology.master_hop_s() + moved) + work
    slowest = min(topology.rate(rank) for rank in range(world))
    if algorithm is Algorithm.DIRECT:
        return topology.slowest_hop_s() + (world - 1) * nbytes / slowest + work
    return 2 * (topology.slowest_hop_s() + (world - 1) / world * nbytes / slowest) + work


def _work_s(algorithm: Algorithm, topology: Topology) -> float:
    """The busiest machine's time with messages, beyond those that a hop's latency counts."""
    others = topology.world_size - 1
    hops = 1 if algorithm is Algorithm.DIRECT else 2

    def messages(rank: int) -> int:
        """Sent and taken by a rank."""
        if algorithm is Algorithm.STAR:
            return 2 * others if rank == 0 else 2
        return 2 * others * hops

    alone = set(range(topology.world_size)) - {r for m in topology.machines for r in m.ranks}
    machines = [*topology.machines, *(Machine((rank,), 1) for rank in alone)]
    busiest = max(sum(map(messages, m.ranks)) / m.cores for m in machines)
    return _MESSAGE_S * max(0.0, busiest - 2 * hops)


@dataclass
class Chooser:
    """Picks the algorithm for each size of message, and learns from what it took."""

    topology: Topology
    factors: dict[Algorithm, float] = field(default_factory=dict)

    @property
    def candidates(self) -> list[Algorithm]:
        """What can be had here; of two ranks, direct is the better of all sizes."""
        if not self.topology.complete:
            return [Algorithm.STAR]
        if self.topology.world_size == 2:
            return [Algorithm.DIRECT]
        return list(Algorithm)

    def expected_s(self, algorithm: Algorithm, nbytes: int) -> float:
        """The model's time, corrected by what was measured."""
        return predict_s(algorithm, self.topology, nbytes) * self.factors.get(algorithm, 1.0)

    def choose(self, nbytes: int) -> Algorithm:
        """The quickest for partials of so many bytes."""
        return min(self.candidates, key=lambda algorithm: self.expected_s(algorithm, nbytes))

    def learn(self, algorithm: Algorithm, nbytes: int, measured_s: float) -> None:
        """Account for what one allreduce took, waiting for slower ranks left out."""
        low, high = _BOUNDS
        ratio = measured_s / predict_s(algorithm, self.topology, nbytes)
        known = self.factors.get(algorithm, 1.0)
        self.factors[algorithm] = (1 - _WEIGHT) * known + _WEIGHT * min(max(ratio, low), high)

    def explain(self, sizes: Mapping[str, int]) -> list[str]:
        """Say what was measured and what follows from it, a line each."""
        topology = self.topology
        lines = [
            f"link {i}-{j}: {topology.latency_s[i, j] * 1e3:.2f} ms one way, "
            f"{topology.bytes_per_s[i, j] * 8 / 1e6:,.0f} Mbit/s"
            for i, j in sorted(topology.latency_s)
        ]
        for name, nbytes in sizes.items():
            chosen = self.choose(nbytes)
            times = ", ".join(
                f"{algorithm.value} {self.expected_s(algorithm, nbytes) * 1e3:.2f} ms"
                for algorithm in self.candidates
            )
            lines.append(f"{name} ({format_bytes(nbytes)}): {chosen.value}, of {times}")
        return lines
