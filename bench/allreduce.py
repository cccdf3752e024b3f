"""How long one allreduce takes over emulated links, and what the links alone would take.

    python -m bench.allreduce --devices 2,4,8 --latency 1,5 --rate 300

tpirt's algorithms run over tpirt's own transport, between processes in namespaces of their own;
the same sealed, as between devices of a cluster, and torch.distributed's gloo run beside them over
the same links. Sealing on loopback is measured for comparison only: tpirt does not encrypt
loopback. All ranks begin a round together; it takes from when the last has begun to when the last
has the sum. Each algorithm has the floor of its own hops, gloo the least of them.

The CPU time is that of all ranks together, the kernel's part included, per message sent. Where
there are more ranks than cores, ``on cores`` is what that time takes on this machine's cores
however well it is spread: real devices each have their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from bench.lib.allreduce_rank import GLOO, SEALED, Answer, Order
from bench.lib.command import end_like_a_command, new_parser, tell, values
from bench.lib.record import Record, add_json_option
from bench.net import floor
from bench.net.namespace import INTERFACE
from bench.net.network import LOOPBACK, Network, emulate
from bench.net.options import add_backend_option, show_network
from bench.net.relay import RelayBackend
from bench.net.spec import Link, LinkError, uniform
from tpirt.batch import Algorithm, CommDtype
from tpirt.cli.options import count
from tpirt.identity.folder import VARIABLE as IDENTITY
from tpirt.identity.trust import INSECURE
from tpirt.testing.identities import MadeCluster
from tpirt.transport.address import Address
from tpirt.units import format_bytes, parse_bytes

_TPIRT = "tpirt"
_TRIAL_ROUNDS = 5
_PERIOD = 1.3  # of rounds without pause
_PAUSE_S = 1e-3
_LEAST_ROUNDS = 20
_APART = 10  # between the ports of those with TLS and those without


@dataclass(frozen=True)
class Row:
    """One contender, one size, over one kind of links; times of one allreduce."""

    devices: int
    latency_ms: float
    rate_mbit: float | None
    nbytes: int
    contender: str
    rounds: int
    median_ms: float
    p95_ms: float
    floor_ms: float
    ratio: float | None
    cpu_ms: float
    cpu_us_per_message: float | None
    on_cores_ms: float
    forwarder_cpu_ms: float | None


class Ranks:
    """The processes of one contender, one on each device."""

    def __init__(self, processes: list[subprocess.Popen[str]]):
        self._processes = processes
        for rank in range(len(processes)):
            self._read(rank)

    def measure(self, order: Order) -> list[Answer]:
        """Have all ranks carry out an order.

        Raises:
            LinkError: a rank has ended, or the ranks have different sums.
        """
        for process in self._processes:
            _open(process.stdin).write(json.dumps(asdict(order)) + "\n")
            _open(process.stdin).flush()
        answers = [Answer(**json.loads(self._read(rank))) for rank in range(len(self._processes))]
        if len({answer.checksum for answer in answers}) > 1:
            raise LinkError(f"{order}: the ranks have different sums")
        return answers

    def _read(self, rank: int) -> str:
        line = _open(self._processes[rank].stdout).readline()
        if not line:
            code = self._processes[rank].wait()
            raise LinkError(f"rank {rank} ended with exit code {code}; it has said why")
        return line


@contextmanager
def started(contender: str, network: Network, cluster: Path | None = None) -> Iterator[Ranks]:
    """Start one process on each device; they end with the network.

    With a ``cluster``, the folder of its keys, they use TLS.
    """
    processes = []
    keys = {IDENTITY: str(cluster), INSECURE: ""} if cluster else {}
    for device in network.devices:
        others = range(len(network.devices))
        addresses = [_beside(network.reach(device.index, other), cluster) for other in others]
        command = [sys.executable, "-m", "bench.lib.allreduce_rank", contender, str(device.index)]
        processes.append(
            device.popen(
                [*command, _beside(device.listen, cluster), ",".join(addresses)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    **keys,
                    "GLOO_SOCKET_IFNAME": INTERFACE if device.namespace else "lo",
                },
            )
        )
    yield Ranks(processes)


def measure(
    network: Network,
    ranks: Ranks,
    contender: str,
    link: Link,
    order: Order,
    seconds: float,
) -> Row:
    """Measure one contender at one size."""
    trial = ranks.measure(replace(order, rounds=_TRIAL_ROUNDS))
    period_s = _PAUSE_S + _PERIOD * max(_rounds_s(trial))
    rounds = min(order.rounds, max(_LEAST_ROUNDS, int(seconds / period_s)))
    network.forwarded()
    answers = ranks.measure(replace(order, rounds=rounds, period_s=period_s))
    forwarded = network.forwarded()
    times = _rounds_s(answers)
    world_size = len(network.devices)
    wire_bytes = CommDtype(order.comm_dtype).nbytes(1, order.nbytes // 4)
    hops = {
        algorithm: floor.all_reduce_hops(algorithm, world_size, wire_bytes)
        for algorithm in ([order.algorithm] if order.algorithm else _algorithms())
    }
    floor_ms = min(max(floor.finish_ms(network.topology, each)) for each in hops.values())
    median_ms = statistics.median(times) * 1e3
    cpu_ms = sum(answer.cpu_s for answer in answers) / rounds * 1e3
    sent = floor.messages(hops[order.algorithm]) if order.algorithm else None
    return Row(
        devices=world_size,
        latency_ms=link.latency_ms,
        rate_mbit=link.rate_mbit,
        nbytes=order.nbytes,
        contender=contender,
        rounds=rounds,
        median_ms=median_ms,
        p95_ms=statistics.quantiles(times, n=20, method="inclusive")[-1] * 1e3,
        floor_ms=floor_ms,
        ratio=median_ms / floor_ms if floor_ms else None,
        cpu_ms=cpu_ms,
        cpu_us_per_message=cpu_ms * 1e3 / sent if sent else None,
        on_cores_ms=cpu_ms / min(world_size, os.cpu_count() or 1),
        forwarder_cpu_ms=forwarded.cpu_s / rounds * 1e3 if forwarded else None,
    )


def _rounds_s(answers: Sequence[Answer]) -> list[float]:
    """Each round, from the last rank's coming to the last rank's leaving."""
    began = map(max, zip(*(answer.began_s for answer in answers), strict=True))
    ended = map(max, zip(*(answer.ended_s for answer in answers), strict=True))
    return [end - begin for begin, end in zip(began, ended, strict=True)]


def sweep(arguments: argparse.Namespace) -> Iterator[Row]:
    """All rows, one kind of links after another."""
    for devices in arguments.devices:
        links = [Link(latency, rate_mbit=arguments.rate) for latency in arguments.latency]
        if arguments.backend == LOOPBACK:
            links = [Link()]
        with emulate(uniform(links[0], devices), backend=arguments.backend) as network:
            show_network(network)
            with (
                tempfile.TemporaryDirectory() as keys,
                started(_TPIRT, network) as ours,
                _sealed(network, Path(keys)) as sealed,
                _gloo(network) as gloo,
            ):
                for link in links:
                    network.change(uniform(link, devices))
                    for nbytes in arguments.sizes:
                        tell(f"{devices} devices, {link}, {format_bytes(nbytes)}")
                        for name in arguments.collective:
                            order = Order(
                                nbytes,
                                arguments.rounds,
                                algorithm=name,
                                comm_dtype=arguments.comm_dtype,
                            )
                            yield measure(network, ours, name, link, order, arguments.seconds)
                            if sealed is not None:
                                label = f"{name} {SEALED}"
                                yield measure(
                                    network, sealed, label, link, order, arguments.seconds
                                )
                        if gloo is not None:
                            order = Order(nbytes, arguments.rounds)
                            yield measure(network, gloo, GLOO, link, order, arguments.seconds)


@contextmanager
def _sealed(network: Network, folder: Path) -> Iterator[Ranks | None]:
    """The same with TLS, all peers with one certificate; None on relays, which lead to one port."""
    if isinstance(network.backend, RelayBackend):
        yield None
    else:
        MadeCluster(folder).peer(folder)
        with started(SEALED, network, folder) as ranks:
            yield ranks


def _beside(address: str, cluster: Path | None) -> str:
    """Another port of the same device for those with TLS."""
    host, port = Address.parse(address)
    return str(Address(host, port + _APART)) if cluster else address


@contextmanager
def _gloo(network: Network) -> Iterator[Ranks | None]:
    """Gloo's processes; None on relays, which it cannot be led through."""
    if isinstance(network.backend, RelayBackend):
        tell("gloo is left out: it needs namespaces")
        yield None
    else:
        with started(GLOO, network) as ranks:
            yield ranks


def show(rows: Sequence[Row]) -> None:
    """Print the table for people."""
    print(
        "devices   link ms     size   contender         median ms      p95    floor   ratio"
        "   gloo   CPU us/msg   on cores ms"
    )
    for row in rows:
        rivals = [
            other.median_ms
            for other in rows
            if other.contender == GLOO
            and (other.devices, other.latency_ms, other.nbytes)
            == (row.devices, row.latency_ms, row.nbytes)
        ]
        gloo = f"{rivals[0] / row.median_ms:.1f}x" if rivals else "-"
        cpu = "-" if row.cpu_us_per_message is None else f"{row.cpu_us_per_message:.0f}"
        print(
            f"{row.devices:7d} {row.latency_ms:9g} {format_bytes(row.nbytes):>8}   "
            f"{row.contender:15} {row.median_ms:11.3f} {row.p95_ms:8.3f} {row.floor_ms:8.3f} "
            f"{_ratio(row):>7} {gloo:>6} {cpu:>12} {row.on_cores_ms:13.3f}"
        )

    if any(SEALED in row.contender and not row.latency_ms for row in rows):
        print("sealed on loopback: measured for comparison; tpirt does not encrypt loopback")


def main(argv: Sequence[str]) -> int:
    """Parse arguments, measure, print, keep."""
    parser = new_parser("bench.allreduce", __doc__)
    parser.add_argument("--devices", type=values(count), default=[2, 4], metavar="N,...")
    parser.add_argument(
        "--latency", type=values(float), default=[1.0, 5.0], metavar="MS,...", help="one way"
    )
    parser.add_argument("--rate", type=float, default=300.0, metavar="MBIT")
    parser.add_argument(
        "--sizes",
        type=values(parse_bytes),
        default=[16 << 10, 32 << 10, 64 << 10, 1 << 20],
        metavar="SIZE,...",
        help="of a partial sum in float32 (default 16K,32K,64K,1M)",
    )
    parser.add_argument(
        "--collective", type=values(_algorithm), default=_algorithms(), metavar="NAME,..."
    )
    parser.add_argument(
        "--comm-dtype", choices=[comm_dtype.value for comm_dtype in CommDtype], default="float32"
    )
    parser.add_argument("--rounds", type=count, default=200)
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="fewer rounds, where they would take longer"
    )
    add_backend_option(parser)
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    record = Record("allreduce", argv, arguments)
    rows = list(sweep(arguments))
    show(rows)
    record.finish({"rows": [asdict(row) for row in rows]})
    return 0


def _ratio(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f}"


def _algorithms() -> list[str]:
    return [algorithm.value for algorithm in Algorithm]


def _algorithm(text: str) -> str:
    return Algorithm(text).value


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
