"""``tpirt peer``."""

from __future__ import annotations

import argparse

from tpirt.cli.options import (
    Commands,
    add_parser,
    add_process_options,
    add_trust_options,
    address,
    run_async,
    size,
)
from tpirt.transport.address import DEFAULT_PORT, Address


def add_command(commands: Commands) -> None:
    """Add ``peer`` and its options."""
    parser = add_parser(
        commands,
        "peer",
        "run a worker peer, which serves one master at a time",
        "tpirt peer --join 192.168.1.5:50050/4821-0937\n  tpirt peer --memory 2G\n"
        "  tpirt peer --listen 192.168.1.7:50051",
    )
    parser.add_argument(
        "--join",
        metavar="HOST:PORT/CODE",
        help="first get a certificate of the cluster whose master shows this code (`tpirt cluster "
        "invite` there); needed once",
    )
    parser.add_argument(
        "--listen",
        type=lambda text: address(text, lowest_port=0),
        default=Address("0.0.0.0", DEFAULT_PORT),
        metavar="HOST[:PORT]",
        help="address to listen on; port 0 selects a free port (default: all addresses of this "
        f"device, port {DEFAULT_PORT})",
    )
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="maximum memory of this process, such as 900M"
    )
    add_process_options(parser)
    add_trust_options(parser)
    parser.add_argument(
        "--no-announce",
        action="store_true",
        help="do not announce this peer by mDNS, by which `tpirt peers` and --discover find it",
    )
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="exit when standard input closes, such as at the end of the parent process",
    )
    parser.add_argument("--quiet", action="store_true", help="do not report sessions on stderr")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from tpirt.cluster.machine import default_threads
    from tpirt.identity.names import PEER
    from tpirt.identity.trust import Trust
    from tpirt.peer.process import PeerOptions, run_peer
    from tpirt.weights.store import SliceStore, default_store

    host, port = arguments.listen
    trust = Trust(PEER, arguments.identity, insecure=arguments.insecure)
    options = PeerOptions(
        host=host,
        port=port,
        memory_bytes=arguments.memory,
        threads=arguments.threads or default_threads(),
        store=SliceStore(
            Path(arguments.store) if arguments.store else default_store(), arguments.store_limit
        ),
        until_stdin_closes=arguments.until_stdin_closes,
        quiet=arguments.quiet,
        trust=trust,
        announce=not arguments.no_announce,
    )
    run_async(run_peer(options, arguments.join))
