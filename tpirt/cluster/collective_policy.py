"""How the group's sums come about: links measured when ranks meet, an algorithm for every step."""

from __future__ import annotations

from collections.abc import Sequence

from tpirt.batch import Algorithm, Collective, CommDtype
from tpirt.cluster.probing import measure
from tpirt.collectives.cost_model import Chooser, Machine, Topology
from tpirt.errors import TransportError
from tpirt.planning import CollectiveOptions
from tpirt.transport.base import Channel
from tpirt.transport.codec import Frame
from tpirt.transport.pb import tpirt_pb2 as pb

_WORTH_HIDING_S = 4e-3
_LEAST_HALVED = 32
_DECODED_TOKENS = 8  # steps of more are not learnt from: their ranks wait for each other's compute


class CollectivePolicy:
    """The master's choice of collectives, step by step.

    Attributes:
        notice: why what was asked for is not to be had; empty if it is.
        detours: links whose frames go through gRPC, and why, a line each.
    """

    def __init__(
        self, chooser: Chooser, options: CollectiveOptions, comm_dtype: CommDtype, hidden_size: int
    ):
        self.notice = ""
        self.detours: list[str] = []
        self._chooser = chooser
        self._comm_dtype = comm_dtype
        self._hidden_size = hidden_size
        self._fixed = options.algorithm if chooser.topology.complete else Algorithm.STAR

    def for_step(self, tokens: int) -> Collective:
        """Choose for a step of so many tokens."""
        nbytes = self._nbytes(tokens)
        learned = tokens <= _DECODED_TOKENS
        choose = self._chooser.choose_to_learn if learned else self._chooser.choose
        algorithm = self._fixed or choose(nbytes)
        # Products of half the tokens are less efficient, and can differ in their last bits: not
        # for sums that take no time, and not by what changes from step to step.
        topology = self._chooser.topology
        slow = (
            not topology.on_loopback
            and self._chooser.predicted_s(algorithm, nbytes) > _WORTH_HIDING_S
        )
        return Collective(
            algorithm, self._comm_dtype, micro_batches=slow and tokens >= _LEAST_HALVED
        )

    def learn(self, tokens: int, algorithm: Algorithm, measured_s: float) -> None:
        """Account for what a step's allreduces took at the median."""
        if tokens <= _DECODED_TOKENS:
            self._chooser.learn(algorithm, self._nbytes(tokens), measured_s)

    def explain(self, chunk_tokens: int) -> list[str]:
        """Say what was measured and chosen, a line each."""
        sizes = {"one token": self._nbytes(1), f"{chunk_tokens} tokens": self._nbytes(chunk_tokens)}
        lines = [*self.detours, *self._chooser.explain(sizes)]
        if self._fixed is not None:
            lines.append(f"used: {self._fixed.value} ({self.notice or 'as asked for'})")
        return [*lines, f"on the wire: {self._comm_dtype.value}"]

    def _nbytes(self, tokens: int) -> int:
        return self._comm_dtype.nbytes(tokens * self._hidden_size)


async def meet(
    channels: Sequence[Channel],
    links: Sequence[Sequence[pb.LinkState]],
    machines: Sequence[Machine],
    options: CollectiveOptions,
    comm_dtype: CommDtype,
    hidden_size: int,
    timeout_s: float,
) -> CollectivePolicy:
    """Measure the master's links, add what the workers measured, and decide.

    Args:
        channels: to the workers, by rank.
        links: what each worker said of its links to the others; empty where none were wanted.
        machines: who shares cores with whom.
        options: what the user asks for.
        comm_dtype: form of the sums.
        hidden_size: H.
        timeout_s: longest silence of a worker.

    Raises:
        PeerLostError, TransportError: a worker is gone or makes no sense.
    """
    latency: dict[tuple[int, int], float] = {}
    rate: dict[tuple[int, int], float] = {}
    via = {(0, rank): channel.via for rank, channel in enumerate(channels, start=1)}
    for rank, channel in enumerate(channels, start=1):
        quality = await measure(channel, timeout_s)
        latency[0, rank], rate[0, rank] = quality.latency_s, quality.bytes_per_s
    failures: list[str] = []
    linked = len(channels) == 1 or all(len(states) == len(channels) - 1 for states in links)
    for rank, states in enumerate(links, start=1):
        for state in states:
            if state.failure:
                text = f"rank {rank} has no link to rank {state.rank}: {state.failure}"
                # Whoever opens it knows more than who waits for it.
                failures.insert(0 if rank > state.rank else len(failures), text)
    if linked and not failures and len(channels) > 1:
        for channel in channels:
            await channel.send(Frame(pb.FrameHeader(measure_links=pb.MeasureLinks())))
        for rank, channel in enumerate(channels, start=1):
            for state in await _measured(channel, timeout_s):
                pair = (state.rank, rank)
                latency[pair] = max(1e-6, state.latency_s)
                rate[pair] = max(1.0, state.bytes_per_s)
                via[pair] = state.via
    complete = linked and not failures
    topology = Topology(len(channels) + 1, latency, rate, complete, tuple(machines))
    sums = CollectivePolicy(Chooser(topology), options, comm_dtype, hidden_size)
    sums.detours = [
        f"link {i}-{j}: over {how}" for (i, j), how in sorted(via.items()) if how.startswith("grpc")
    ]
    if failures and options.algorithm is not Algorithm.STAR:
        sums.notice = f"sums go through the master (star): {failures[0]}"
    return sums


async def _measured(channel: Channel, timeout_s: float) -> Sequence[pb.LinkState]:
    frame = await channel.recv(timeout_s)
    if frame.kind != "link_states":
        raise TransportError(f"peer {channel.peer_id}: expected link_states, got {frame.kind}")
    return frame.header.link_states.links
