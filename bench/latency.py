"""Time per token over emulated links: where it goes, and what physics would allow.

    python -m bench.latency --devices 4 --link 1ms/300mbit --shape bench-1.1b --quantize int4
    python -m bench.latency --profile home-wifi --model DIR
    python -m bench.latency --devices 2,4 --latency 0.1,0.5,1,2,5,10 --collective star,one-shot \\
        --shape bench-1.1b --quantize int4 --plot latency.png --json latency.json

Real peers run in network namespaces of their own, on this machine's cores. Lists are swept, every
value with every other one. The floor of a token is the compute of the busiest rank, measured in
the same run without links, and what the links need for the hops of the collective that was used:
latency, and serialization of what the busiest link carries. ``hidden`` is the share of the links'
part of the first token that took no time of its own, for it was under way while ranks computed;
``apart`` is that share when the time is left out which the emulator itself took of the cores.

With more peers than cores, ranks wait for cores, not only for links: compare the compute column.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.lib.command import (
    add_rank_options,
    end_like_a_command,
    new_parser,
    rank_options,
    tell,
    values,
)
from bench.lib.group import Group
from bench.lib.latency_row import Bench, Row, Setting
from bench.lib.record import Record, add_json_option
from bench.lib.synthetic import model_of_shape
from bench.net.network import LOOPBACK, emulate
from bench.net.options import (
    USUAL_LINK,
    add_backend_option,
    add_share_options,
    chosen_shares,
    show_network,
)
from bench.net.profiles import PROFILES
from bench.net.spec import Link, LinkError, Topology, parse_link, parse_topology, uniform
from tpirt.cli.options import count
from tpirt.cluster.machine import default_threads


def sweep(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """All rows: one network for each number of devices, one connection for each setting."""
    for devices in arguments.devices or [_default_devices(arguments)]:
        points = chosen_points(arguments, devices)
        engine, peer = _options(arguments, devices, folder)
        shares = chosen_shares(arguments, devices)
        nothing = uniform(Link(), devices)
        with emulate(nothing, backend=arguments.backend, shares=shares) as network:
            show_network(network)
            with Group(network.devices, peer, folder / "peers.log") as group:
                bench = Bench(arguments, network, group, engine)
                tell(f"{devices} devices, without links")
                base = bench.base()
                for label, topology in points:
                    for setting in _settings(arguments):
                        tell(f"{devices} devices, {label}, {setting}")
                        yield bench.row(topology, label, setting, base)


def chosen_points(arguments: argparse.Namespace, devices: int) -> list[tuple[str, Topology]]:
    """The links to sweep over, each with its name.

    Raises:
        LinkError: they make no sense, or are not all alike and yet to be varied.
    """
    varied = arguments.latency or arguments.rate or arguments.jitter
    usual = "0ms" if arguments.backend == LOOPBACK else USUAL_LINK
    text = PROFILES[arguments.profile].link if arguments.profile else arguments.link or usual
    try:
        link = parse_link(text)
    except LinkError:
        if varied:
            raise LinkError(
                "--latency, --rate and --jitter vary links that are all alike; "
                f"{text!r} is not one value for all"
            ) from None
        return [(arguments.profile or text, parse_topology(text, devices))]
    links = [
        replace(link, latency_ms=latency, rate_mbit=rate, jitter_ms=jitter)
        for latency in arguments.latency or [link.latency_ms]
        for rate in arguments.rate or [link.rate_mbit]
        for jitter in arguments.jitter or [link.jitter_ms]
    ]
    # Read again: a value that makes no sense is refused here.
    return [(str(each), uniform(parse_link(str(each)), devices)) for each in links]


def show(rows: Sequence[Row]) -> None:
    """Print the table for people."""
    print(
        "dev  links               collective  dtype     window   TTFT ms  hidden   apart  TPOT ms"
        "     p95     p99  compute   disk  network  other   floor  ratio  hops  KiB/token  busiest"
    )
    for row in rows:
        window = "-" if row.window is None else str(row.window)
        hidden, apart = (
            "-" if share is None else f"{share:.0%}" for share in (row.hidden, row.hidden_apart)
        )
        busiest = max(row.busiest_sent_bytes, row.busiest_received_bytes) / 1024
        print(
            f"{row.devices:3d}  {row.link[:18]:18}  {row.collective:10}  {row.comm_dtype:8}  "
            f"{window:>6} "
            f"{row.ttft_ms:9.1f} {hidden:>7} {apart:>7} {row.tpot_ms:8.2f} {row.tpot_p95_ms:7.2f} "
            f"{row.tpot_p99_ms:7.2f} {row.compute_ms:8.2f} {row.disk_ms:6.2f} "
            f"{row.network_ms:8.2f} {row.other_ms:6.2f} {row.floor_ms:7.2f} {row.ratio:6.2f} "
            f"{row.hops:5d} {row.wire_bytes / 1024:10.0f} {busiest:8.0f}"
        )


def main(argv: Sequence[str]) -> int:
    """Parse arguments, measure, print, draw, keep."""
    arguments = _parser().parse_args(argv)
    record = Record("latency", argv, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(sweep(arguments, arguments.dir or Path(scratch)))
    show(rows)
    if arguments.plot is not None:
        from bench.lib.latency_plot import draw

        draw(rows, arguments.plot)
        tell(f"drawn: {arguments.plot}")
    record.finish({"rows": [asdict(row) for row in rows]})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench.latency", __doc__)
    links = parser.add_argument_group("links", "one way, device to device; see bench.links")
    links.add_argument("--devices", type=values(count), metavar="N,...", help="default 2")
    which = links.add_mutually_exclusive_group()
    which.add_argument("--link", metavar="SPEC", help=f"default {USUAL_LINK}; loopback: none")
    which.add_argument("--profile", choices=PROFILES)
    links.add_argument("--latency", type=values(float), metavar="MS,...")
    links.add_argument("--rate", type=values(float), metavar="MBIT,...")
    links.add_argument("--jitter", type=values(float), metavar="MS,...")
    add_backend_option(links)
    add_share_options(links)
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="DIR")
    source.add_argument("--shape", metavar="NAME", help="random weights: see `tpirt synth`")
    add_rank_options(model)
    model.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="keeps slices and the models of --shape between runs (default: a temporary folder)",
    )
    model.add_argument("--collective", type=values(str), default=[None], metavar="NAME,...")
    model.add_argument("--comm-dtype", type=values(str), default=[None], metavar="FORM,...")
    model.add_argument("--window", type=values(count), default=[None], metavar="N,...")
    model.add_argument("--prompt-tokens", type=count, default=64, metavar="N")
    model.add_argument("--tokens", type=count, default=32, metavar="N", help="after the first")
    model.add_argument("--trials", type=count, default=5, metavar="N")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    add_json_option(parser)
    return parser


def _default_devices(arguments: argparse.Namespace) -> int:
    return PROFILES[arguments.profile].devices if arguments.profile else 2


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    return [
        Setting(collective, comm_dtype, window)
        for window in arguments.window
        for comm_dtype in arguments.comm_dtype
        for collective in arguments.collective
    ]


def _options(
    arguments: argparse.Namespace, devices: int, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of ``Engine.connect``, and options of ``tpirt peer``."""
    store, model = folder / "slices", arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.shape is not None:
        model, store = model_of_shape(
            arguments.shape, arguments.quantize, arguments.dtype, devices, folder
        )
    threads = arguments.threads or default_threads(devices)
    engine = {
        **rank_options(arguments),
        "model": str(model),
        "threads": threads,
        "store": str(store),
    }
    peer = ["--store", str(store), "--threads", str(threads)]
    if arguments.memory is not None:
        peer += ["--memory", str(arguments.memory)]
    return engine, peer


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
