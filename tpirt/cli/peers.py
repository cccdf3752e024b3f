"""``tpirt peers``."""

from __future__ import annotations

import argparse

from tpirt.cli.options import (
    Commands,
    add_parser,
    add_search_options,
    add_trust_options,
    run_async,
)


def add_command(commands: Commands) -> None:
    """Add ``peers`` and its options."""
    parser = add_parser(
        commands,
        "peers",
        "list the devices of the cluster and those that announce themselves on the network",
        "tpirt peers",
    )
    add_search_options(parser)
    add_trust_options(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tpirt.cluster import discovery  # noqa: F401 - before SIGINT can interrupt the import
    from tpirt.transport import grpc  # noqa: F401

    run_async(_peers(arguments))


async def _peers(arguments: argparse.Namespace) -> None:
    from tpirt.cli.devices import show_peers, surveyed
    from tpirt.identity.names import MASTER
    from tpirt.identity.trust import Trust

    trust = Trust(MASTER, arguments.identity, insecure=arguments.insecure)
    found, notes = await surveyed(arguments, trust, strangers=True)
    show_peers(found, notes, json_wanted=arguments.json)
