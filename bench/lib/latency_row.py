"""One row of ``bench.latency``: what a token took, and what it would take at least."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.lib.command import percentile
from bench.lib.group import Group, Request
from bench.net import floor
from bench.net.network import Network
from bench.net.relay import RelayBackend
from bench.net.spec import LinkError, Topology
from bench.net.tunnels import Forwarded
from tpirt.batch import Algorithm, CommDtype

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Row:
    """One setting; times in milliseconds, those of a token medians over tokens of all trials.

    ``compute_ms``, ``disk_ms``, ``network_ms`` and ``other_ms`` are parts of ``tpot_ms``, as
    :class:`tpirt.types.TokenTimes` tells them apart. ``resident_ms`` is the compute of the same
    ranks without links, ``links_ms`` what the links need. ``hidden`` is the share of the links'
    part of the first token that added nothing to its time; ``hidden_apart`` does not count what
    the emulator took of the ranks' cores, ``emulator_ms`` on each of them. Bytes are on the wire,
    headers included, per decoded token: of all devices, and of the busiest one each way.
    """

    devices: int
    link: str
    latency_ms: float | None
    collective: str
    comm_dtype: str
    window: int | None
    ttft_ms: float
    tpot_ms: float
    tpot_p95_ms: float
    tpot_p99_ms: float
    compute_ms: float
    disk_ms: float
    network_ms: float
    other_ms: float
    resident_ms: float
    links_ms: float
    floor_ms: float
    ratio: float
    hops: int
    base_ttft_ms: float
    emulator_ms: float
    hidden: float | None
    hidden_apart: float | None
    wire_bytes: float
    busiest_sent_bytes: float
    busiest_received_bytes: float
    device_bytes: list[tuple[float, float]]
    forwarded: Forwarded | None


@dataclass(frozen=True)
class Base:
    """The same group without links: the compute of a token and the first token's time."""

    resident_ms: float
    ttft_ms: float


@dataclass(frozen=True)
class Setting:
    """What one connection of the master is made with; None is tpirt's own default."""

    collective: str | None
    comm_dtype: str | None
    window: int | None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``Engine.connect``."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.options().items()) or "defaults"


@dataclass(frozen=True)
class Sample:
    """One request over a network.

    Attributes:
        emulator_cpu_ms: what the links' forwarder computed until the first token.
        traffic: bytes sent and received per device while decoding.
    """

    request: Request
    emulator_cpu_ms: float
    traffic: list[tuple[int, int]]


class Bench:
    """One network's group and what it is asked for."""

    def __init__(
        self, arguments: argparse.Namespace, network: Network, group: Group, engine: dict[str, Any]
    ):
        self._arguments = arguments
        self._network = network
        self._group = group
        self._engine = engine
        self._model: dict[str, int] = {}

    def base(self) -> Base:
        """Measure without links; the first connection also hands the slices out."""
        samples = self._samples(Setting(None, None, None))
        return Base(
            statistics.median(_each(samples, "compute_ms")),
            statistics.median(sample.request.ttft_ms for sample in samples),
        )

    def row(self, topology: Topology, label: str, setting: Setting, base: Base) -> Row:
        """Measure one setting over one kind of links."""
        self._network.change(topology)
        self._network.forwarded()
        samples = self._samples(setting)
        forwarded = self._network.forwarded()
        last = samples[-1].request
        hops = self._hops(last.collective, last.comm_dtype, 1) if topology.devices > 1 else []
        links_ms = floor.finish_ms(topology, hops)[0]
        totals = _each(samples, "total_ms")
        tpot_ms = statistics.median(totals)
        floor_ms = base.resident_ms + links_ms
        ttft_ms = statistics.median(sample.request.ttft_ms for sample in samples)
        emulator_ms = self._emulator_ms(samples)
        added_ms = ttft_ms - base.ttft_ms
        traffic = _per_token(samples)
        latencies = {topology.latency_ms(*pair) for pair in topology.routes()}
        return Row(
            devices=topology.devices,
            link=label,
            latency_ms=latencies.pop() if len(latencies) == 1 else None,
            collective=last.collective,
            comm_dtype=last.comm_dtype,
            window=setting.window,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            tpot_p95_ms=percentile(totals, 95),
            tpot_p99_ms=percentile(totals, 99),
            compute_ms=statistics.median(_each(samples, "compute_ms")),
            disk_ms=statistics.median(_each(samples, "io_ms")),
            network_ms=statistics.median(_each(samples, "comm_ms")),
            other_ms=statistics.median(_each(samples, "other_ms")),
            resident_ms=base.resident_ms,
            links_ms=links_ms,
            floor_ms=floor_ms,
            ratio=tpot_ms / floor_ms,
            hops=floor.latencies(topology.devices, hops),
            base_ttft_ms=base.ttft_ms,
            emulator_ms=emulator_ms,
            hidden=self._hidden(topology, last.comm_dtype, added_ms) if hops else None,
            hidden_apart=(
                self._hidden(topology, last.comm_dtype, added_ms - emulator_ms) if hops else None
            ),
            wire_bytes=sum(sent for sent, _ in traffic),
            busiest_sent_bytes=max(sent for sent, _ in traffic),
            busiest_received_bytes=max(received for _, received in traffic),
            device_bytes=traffic,
            forwarded=forwarded,
        )

    def _samples(self, setting: Setting) -> list[Sample]:
        network, arguments = self._network, self._arguments
        relays = isinstance(network.backend, RelayBackend)
        if relays and len(network.devices) > 2 and setting.collective != Algorithm.STAR.value:
            raise LinkError(
                f"{network.backend.name}: peers cannot tell each other where their relays are; "
                "take --collective star, or run as root"
            )
        peers = [network.reach(0, device.index) for device in network.devices[1:]]
        self._model = dict(self._group.connect(peers, **self._engine, **setting.options()))
        self._group.generate(arguments.prompt_tokens, _WARM_UP_TOKENS)
        return [self._sample() for _ in range(arguments.trials)]

    def _sample(self) -> Sample:
        network, arguments = self._network, self._arguments
        began_cpu_s = network.emulator_cpu_s()
        first_cpu_s = began_cpu_s
        before: list[tuple[int, int]] = []

        def at_first_token() -> None:
            nonlocal first_cpu_s
            first_cpu_s = network.emulator_cpu_s()
            before.extend(self._traffic())

        request = self._group.generate(arguments.prompt_tokens, arguments.tokens, at_first_token)
        traffic = [
            (sent - sent_before, received - received_before)
            for (sent, received), (sent_before, received_before) in zip(
                self._traffic(), before, strict=True
            )
        ]
        return Sample(request, (first_cpu_s - began_cpu_s) * 1e3, traffic)

    def _traffic(self) -> list[tuple[int, int]]:
        return [self._network.traffic(device.index) for device in self._network.devices]

    def _hops(self, collective: str, comm_dtype: str, tokens: int) -> list[floor.Hop]:
        """The hops of a step of so many tokens, whose last one's result is wanted."""
        hidden_size, form = self._model["hidden_size"], CommDtype(comm_dtype)
        return floor.step_hops(
            collective,
            len(self._network.devices),
            self._model["layers"],
            hidden_bytes=self._model["embedding_bytes"] * tokens,
            sum_bytes=form.nbytes(tokens * hidden_size),
            last_bytes=form.nbytes(hidden_size),
            spread=tokens > 1 and collective != Algorithm.STAR.value,
        )

    def _emulator_ms(self, samples: Sequence[Sample]) -> float:
        """What the emulator took from ranks that keep all cores busy with a prompt."""
        cores = len(os.sched_getaffinity(0))
        if len(self._network.devices) * self._engine["threads"] < cores:
            return 0.0
        return statistics.median(sample.emulator_cpu_ms for sample in samples) / cores

    def _hidden(self, topology: Topology, comm_dtype: str, added_ms: float) -> float | None:
        """Share of the links' part of the first token that did not add to its time."""
        tokens = self._arguments.prompt_tokens
        links_ms = min(
            floor.finish_ms(topology, self._hops(algorithm.value, comm_dtype, tokens))[0]
            for algorithm in Algorithm
        )
        return 1 - added_ms / links_ms if links_ms else None


def _each(samples: Sequence[Sample], key: str) -> list[float]:
    return [token[key] for sample in samples for token in sample.request.decoded]


def _per_token(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Bytes sent and received per decoded token, of each device."""
    tokens = sum(len(sample.request.decoded) for sample in samples)
    devices = zip(*(sample.traffic for sample in samples), strict=True)
    return [
        (sum(sent for sent, _ in each) / tokens, sum(received for _, received in each) / tokens)
        for each in devices
    ]
