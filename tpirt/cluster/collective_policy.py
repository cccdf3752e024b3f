"""The master's choice of a collective for every step, from links measured at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpirt.batch import Algorithm, Collective, CommDtype
from tpirt.cluster.probing import measure
from tpirt.collectives.cost_model import Chooser, Machine, Topology
from tpirt.collectives.links import LinkSet
from tpirt.errors import TpirtError, TransportError
from tpirt.planning import CollectiveOptions
from tpirt.protocol.link import Link
from tpirt.protocol.messages import LinkQuality, LinkState, MeasureLink
from tpirt.transport.base import Carrier
from tpirt.types import Progress, ProgressCallback

_WORTH_HIDING_S = 4e-3
_LEAST_SPLIT = 32
_DECODED_TOKENS = 8  # steps of more are not learned from: their ranks wait for each other's compute


Pair = tuple[int, int]  # of ranks, the lower one first


@dataclass(frozen=True)
class LinkMatrix:
    """The links between ranks: their measurements, or the reason why there is none.

    Attributes:
        world_size: number of ranks.
        latency_s, bytes_per_s: of each measured pair.
        carriers: what carries each link.
        failures: links between workers that could not be opened or measured, one line each.
        complete: whether every pair of ranks has a link.
    """

    world_size: int
    latency_s: Mapping[Pair, float]
    bytes_per_s: Mapping[Pair, float]
    carriers: Mapping[Pair, Carrier]
    failures: Sequence[str] = ()
    complete: bool = True

    def detours(self) -> list[str]:
        """Links over gRPC and the reasons, one line each."""
        return [
            f"link {i}-{j}: over grpc" + (f" ({carrier.reason})" if carrier.reason else "")
            for (i, j), carrier in sorted(self.carriers.items())
            if carrier.kind == "grpc"
        ]

    def seals(self) -> list[str]:
        """What protects the links beyond loopback, one line for each way."""
        pairs: dict[str, list[str]] = {}
        for (i, j), carrier in sorted(self.carriers.items()):
            if carrier.seal:
                pairs.setdefault(carrier.seal, []).append(f"{i}-{j}")
        return [f"links {', '.join(pairs[seal])}: {_protection(seal)}" for seal in pairs]


async def survey_links(
    links: LinkSet, states: Mapping[int, Sequence[LinkState]], progress: ProgressCallback
) -> LinkMatrix:
    """Measure all links in turn, because concurrent measurements would disturb each other.

    Args:
        links: the master's links to all workers.
        states: each worker's report on its links to the others; empty if none were wanted.
        progress: called after each link.

    Raises:
        PeerLostError, TransportError: the master's own link to a worker is gone.

    If cancelled, a worker may still finish its measurement; the answer is ignored.
    """
    ranks = sorted(links.others)
    pairs = [(i, j) for j in ranks for i in range(j)]
    found: dict[Pair, LinkQuality] = {}
    carriers = {(0, rank): links[rank].channel.carrier for rank in ranks}
    failures = _failures(states)
    linked = len(ranks) == 1 or all(len(states[rank]) == len(ranks) - 1 for rank in ranks)
    for rank in ranks:
        for state in states[rank]:
            pair = min(rank, state.rank), max(rank, state.rank)
            carriers[pair] = Carrier(state.carrier, state.reason, state.seal)
    wanted = pairs if linked and not failures else [(0, rank) for rank in ranks]
    for number, (i, j) in enumerate(wanted, start=1):
        try:
            found[i, j] = await _quality(links[j], i)
        except TpirtError as exc:
            if i == 0 or links[j].lost is not None:
                raise
            failures.append(f"the link of rank {j} to rank {i} failed: {exc}")
        progress(Progress("measuring links", number, len(wanted), "links"))
    return LinkMatrix(
        world_size=len(ranks) + 1,
        latency_s={pair: max(1e-6, quality.latency_s) for pair, quality in found.items()},
        bytes_per_s={pair: max(1.0, quality.bytes_per_s) for pair, quality in found.items()},
        carriers=carriers,
        failures=failures,
        complete=linked and not failures,
    )


async def _quality(link: Link, other: int) -> LinkQuality:
    """The quality of the link between ``other`` and the worker at the end of ``link``."""
    if other == 0:
        return await measure(link)
    answer = (await link.request(MeasureLink(other))).body
    if not isinstance(answer, LinkQuality):
        raise TransportError(
            f"peer {link.peer_id}: expected LinkQuality, got {type(answer).__name__}; refused"
        )
    return answer


def _protection(seal: str) -> str:
    """Describe what protects a link, and what that costs this machine."""
    from tpirt.transport.sealing import costs  # only where it is in use already

    if seal not in costs():
        return f"protected by {seal}"
    return f"sealed, {seal}, {costs()[seal] * 1e6:.1f} us per 16 KiB on each side"


def _failures(states: Mapping[int, Sequence[LinkState]]) -> list[str]:
    """Links that could not be opened; the opener's reason first, because it knows more."""
    lines = [
        (rank < state.rank, f"rank {rank} has no link to rank {state.rank}: {state.reason}")
        for rank, of_rank in states.items()
        for state in of_rank
        if not state.carrier
    ]
    return [line for _, line in sorted(lines)]


class CollectivePolicy:
    """The master's choice of collectives, step by step."""

    def __init__(
        self,
        links: LinkMatrix,
        machines: Sequence[Machine],
        options: CollectiveOptions,
        comm_dtype: CommDtype,
        hidden_size: int,
    ):
        """Decide from measured links.

        Args:
            links: of all ranks.
            machines: who shares cores with whom.
            options: what the user asks for.
            comm_dtype: form of the sums.
            hidden_size: H.
        """
        topology = Topology(
            links.world_size, links.latency_s, links.bytes_per_s, links.complete, tuple(machines)
        )
        self._shortfall = ""  # why the requested algorithm is not available
        if links.failures and options.algorithm is not Algorithm.STAR:
            self._shortfall = f"sums go through the master (star): {links.failures[0]}"
        self._links = links
        self._chooser = Chooser(topology)
        self._comm_dtype = comm_dtype
        self._hidden_size = hidden_size
        self._fixed = options.algorithm if topology.complete else Algorithm.STAR

    @property
    def notices(self) -> list[str]:
        """What makes the links slower than they could be, a line each."""
        detours = self._links.detours()
        more = f", and {len(detours) - 1} more" if len(detours) > 1 else ""
        slower = [f"{detours[0]}{more}; slower than a TCP connection"] if detours else []
        return [*filter(None, [self._shortfall]), *slower]

    def for_step(self, tokens: int) -> Collective:
        """Choose for a step of ``tokens`` tokens."""
        nbytes = self._nbytes(tokens)
        learned = tokens <= _DECODED_TOKENS
        choose = self._chooser.choose_to_learn if learned else self._chooser.choose
        micro_batches = tokens >= _LEAST_SPLIT and self._is_slow(nbytes)
        return Collective(self._fixed or choose(nbytes), self._comm_dtype, micro_batches)

    def used(self, tokens: int) -> Collective:
        """The collective for a step of ``tokens`` tokens under the current estimates."""
        nbytes = self._nbytes(tokens)
        micro_batches = tokens >= _LEAST_SPLIT and self._is_slow(nbytes)
        algorithm = self._fixed or self._chooser.choose(nbytes)
        return Collective(algorithm, self._comm_dtype, micro_batches)

    def learn(self, tokens: int, algorithm: Algorithm, measured_s: float) -> None:
        """Take the median time of a step's allreduces into account."""
        if tokens <= _DECODED_TOKENS:
            self._chooser.learn(algorithm, self._nbytes(tokens), measured_s)

    def explain(self, chunk_tokens: int) -> list[str]:
        """Describe measurements and choices, one per line."""
        sizes = {"one token": self._nbytes(1), f"{chunk_tokens} tokens": self._nbytes(chunk_tokens)}
        lines = [*self._links.detours(), *self._links.seals(), *self._chooser.explain(sizes)]
        if self._fixed is not None:
            lines.append(f"used: {self._fixed.value} ({self._shortfall or 'as requested'})")
        return [*lines, f"on the wire: {self._comm_dtype.value}"]

    def _is_slow(self, nbytes: int) -> bool:
        """Whether a sum is worth hiding behind the other micro-batch's compute.

        Two halves multiply less efficiently, and may differ in their last bits from a whole. So
        this depends on the links as measured at the start, not on what steps took since.
        """
        if self._chooser.topology.on_loopback:
            return False
        candidates = [self._fixed] if self._fixed else self._chooser.candidates
        fastest = min(self._chooser.predicted_s(algorithm, nbytes) for algorithm in candidates)
        return fastest > _WORTH_HIDING_S

    def _nbytes(self, tokens: int) -> int:
        return self._comm_dtype.nbytes(tokens, self._hidden_size)
