"""A cost model over measured links that chooses the all-reduce algorithm.

Symbols: R ranks, n bytes of a partial on the wire, L(i, j) one-way latency between ranks i and j
including our own work on a message, B(i) the rate of rank i's link (the best of its pairs, because
a pair's rate is bounded by both ends), w the work of sending and receiving messages.

    star      2 (max L(i, 0) + (R - 1) n / B(0)) + w
    one-shot  max L(i, j) + (R - 1) n / min B(i) + w
    two-shot  2 (max L(i, j) + (R - 1) / R n / min B(i)) + w

The second terms include incast: messages from several ranks to one share its link. The work w is
that of the busiest machine: c for each message that its ranks send or receive, divided by its
cores, minus the work included in latencies. Eight ranks on two cores are faster with star, which
has the fewest messages.

Measurements correct the model, which does not know how long ranks wait for a slower one. Every
algorithm has that wait, so all that may be the fastest are tried for a few tokens; they give the
same bits.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import assert_never

from tpirt.batch import Algorithm
from tpirt.units import format_bytes

_LOOPBACK_BYTES_PER_S = 125e6  # lower bound for loopback on a busy machine
_MESSAGE_S = 45e-6  # c: a core's time to send or receive a message (bench.allreduce)
_REMEMBERED = 5  # measurements per algorithm; their median is used, because of stalls
_LEAST = 0.25  # of the prediction; less is noise
_TRIALS = 3  # tokens per algorithm
_WORTH_TRYING = 1.75  # times the best prediction
_CLEARLY = 0.95  # of the time of the current algorithm; smaller differences are noise


@dataclass(frozen=True)
class Machine:
    """Ranks that share a machine's cores."""

    ranks: tuple[int, ...]
    cores: int


@dataclass(frozen=True)
class Topology:
    """The links of all pairs of ranks (i < j); ``complete`` if there are links between workers.

    Ranks that are in none of ``machines`` have their own.
    """

    world_size: int
    latency_s: Mapping[tuple[int, int], float]
    bytes_per_s: Mapping[tuple[int, int], float]
    complete: bool
    machines: tuple[Machine, ...] = ()

    @property
    def on_loopback(self) -> bool:
        """Whether all ranks are on one machine without emulated links."""
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
    """Predicted time of one all-reduce."""
    world = topology.world_size
    work = _work_s(algorithm, topology)
    slowest = min(topology.rate(rank) for rank in range(world))
    match algorithm:
        case Algorithm.STAR:
            moved = (world - 1) * nbytes / topology.rate(0)
            return 2 * (topology.master_hop_s() + moved) + work
        case Algorithm.ONE_SHOT:
            return topology.slowest_hop_s() + (world - 1) * nbytes / slowest + work
        case Algorithm.TWO_SHOT:
            moved = (world - 1) / world * nbytes / slowest
            return 2 * (topology.slowest_hop_s() + moved) + work
        case _:
            assert_never(algorithm)


def _work_s(algorithm: Algorithm, topology: Topology) -> float:
    """Time of the busiest machine for messages that are not included in latencies."""
    hops, messages = _traffic(algorithm, topology.world_size)
    alone = set(range(topology.world_size)) - {r for m in topology.machines for r in m.ranks}
    machines = [*topology.machines, *(Machine((rank,), 1) for rank in alone)]
    busiest = max(sum(messages[rank] for rank in m.ranks) / m.cores for m in machines)
    return _MESSAGE_S * max(0.0, busiest - 2 * hops)


def _traffic(algorithm: Algorithm, world_size: int) -> tuple[int, list[int]]:
    """Sequential hops, and the messages that each rank sends and receives."""
    others = world_size - 1
    match algorithm:
        case Algorithm.STAR:
            return 2, [2 * others] + [2] * others
        case Algorithm.ONE_SHOT:
            return 1, [2 * others] * world_size
        case Algorithm.TWO_SHOT:
            return 2, [4 * others] * world_size
        case _:
            assert_never(algorithm)


@dataclass
class Chooser:
    """Chooses the algorithm for each message size, and learns from measurements.

    Attributes:
        beyond_s: measured minus predicted times per algorithm, of the latest decoded tokens.
    """

    topology: Topology
    beyond_s: dict[Algorithm, deque[float]] = field(default_factory=dict)
    _used: Algorithm | None = None
    _predicted: dict[tuple[Algorithm, int], float] = field(default_factory=dict, repr=False)

    @property
    def candidates(self) -> list[Algorithm]:
        """Available algorithms; for two ranks one-shot is always the fastest."""
        if not self.topology.complete:
            return [Algorithm.STAR]
        if self.topology.world_size == 2:
            return [Algorithm.ONE_SHOT]
        return list(Algorithm)

    def predicted_s(self, algorithm: Algorithm, nbytes: int) -> float:
        """The predicted time; cached, because it is needed for every token."""
        key = algorithm, nbytes
        if key not in self._predicted:
            self._predicted[key] = predict_s(algorithm, self.topology, nbytes)
        return self._predicted[key]

    def expected_s(self, algorithm: Algorithm, nbytes: int) -> float:
        """The predicted time, corrected by measurements of this algorithm or of the others."""
        medians = {tried: statistics.median(took) for tried, took in self.beyond_s.items()}
        beyond = medians.get(algorithm, min(medians.values(), default=0.0))
        predicted = self.predicted_s(algorithm, nbytes)
        return max(predicted + beyond, _LEAST * predicted)

    def choose(self, nbytes: int) -> Algorithm:
        """The fastest algorithm for partials of ``nbytes`` bytes."""
        best = min(self.candidates, key=lambda algorithm: self.expected_s(algorithm, nbytes))
        used = self._used
        if used in self.candidates and used is not None:
            limit = _CLEARLY * self.expected_s(used, nbytes)
            return best if self.expected_s(best, nbytes) < limit else used
        return best

    def choose_to_learn(self, nbytes: int) -> Algorithm:
        """Like :meth:`choose`, for a decoded token whose time will be measured."""
        predicted = {a: self.predicted_s(a, nbytes) for a in self.candidates}
        best = self.choose(nbytes)
        limit = max(_WORTH_TRYING * min(predicted.values()), self.expected_s(best, nbytes))
        untried = [
            algorithm
            for algorithm, time in predicted.items()
            if time <= limit and len(self.beyond_s.get(algorithm, ())) < _TRIALS
        ]
        self._used = min(untried, key=predicted.__getitem__) if untried else best
        return self._used

    def learn(self, algorithm: Algorithm, nbytes: int, measured_s: float) -> None:
        """Record the time of a decoded token's all-reduces."""
        beyond = measured_s - self.predicted_s(algorithm, nbytes)
        self.beyond_s.setdefault(algorithm, deque(maxlen=_REMEMBERED)).append(beyond)

    def explain(self, sizes: Mapping[str, int]) -> list[str]:
        """Describe measurements and choices, one line each."""
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
