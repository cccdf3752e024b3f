"""Emulated links as options of a command, and a report of what was built."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench.lib.command import tell, values
from bench.net.network import BACKENDS, LOOPBACK, Network
from bench.net.probe import Measured
from bench.net.profiles import PROFILES
from bench.net.shares import Share
from bench.net.spec import LinkError, Topology, parse_topology
from tpirt.cli.options import count, size

_DEFAULT_DEVICES = 2
USUAL_LINK = "1ms/300mbit"


def add_link_options(parser: argparse.ArgumentParser) -> None:
    """``--devices``, ``--link``, ``--profile`` and what else makes a network."""
    profiles = "; ".join(
        f"{name}: {each.devices} devices, {each.about}" for name, each in PROFILES.items()
    )
    parser.add_argument("--devices", type=count, metavar="N", help="how many (default 2)")
    links = parser.add_mutually_exclusive_group()
    links.add_argument(
        "--link",
        metavar="SPEC",
        help="such as 1ms/300mbit (the default), 5ms+-1ms/320mbit/loss0.1%%, "
        "'0:1ms/50mbit;1:2ms/1gbit', '0:up=8ms/20mbit,down=2ms/100mbit', '0-1:2ms/100mbit', "
        "'1-2:none'; latency is one way, device to device",
    )
    links.add_argument("--profile", choices=PROFILES, help=profiles)
    add_backend_option(parser)
    add_share_options(parser)


def add_share_options(parser: argparse._ActionsContainer) -> None:
    """``--cores`` and ``--disk``."""
    parser.add_argument(
        "--cores",
        type=values(_cores),
        default=(),
        metavar="C,...",
        help="CPU cores of each device, such as 0.5; one value is for all",
    )
    parser.add_argument(
        "--disk",
        type=values(size),
        default=(),
        metavar="SIZE,...",
        help="bytes a second that each device may read from disk; one value is for all",
    )


def add_backend_option(parser: argparse._ActionsContainer) -> None:
    """``--backend``."""
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS, LOOPBACK),
        default="auto",
        help="what makes the links (default: the first of these that can be had); loopback is "
        "no links, for comparison",
    )


def chosen_topology(arguments: argparse.Namespace) -> Topology:
    """The links that the options ask for.

    Raises:
        LinkError: they make no sense.
    """
    if arguments.profile is None:
        devices = arguments.devices or _DEFAULT_DEVICES
        return parse_topology(arguments.link or USUAL_LINK, devices)
    profile = PROFILES[arguments.profile]
    return parse_topology(profile.link, arguments.devices or profile.devices)


def chosen_shares(arguments: argparse.Namespace, devices: int) -> list[Share]:
    """Each device's share of the machine.

    Raises:
        LinkError: not as many values as devices.
    """
    for name in ("cores", "disk"):
        given = getattr(arguments, name)
        if len(given) not in (0, 1, devices):
            raise LinkError(f"--{name}: {len(given)} values for {devices} devices")

    def share(given: Sequence[float], device: int) -> float | None:
        return given[device % len(given)] if given else None

    return [
        Share(share(arguments.cores, device), share(arguments.disk, device))
        for device in range(devices)
    ]


def show_network(network: Network) -> None:
    """Tell on standard error what was built, why so, and what was measured."""
    reason = f" ({network.reason})" if network.reason else ""
    tell(f"{network.topology.devices} devices, {network.backend.name}{reason}")
    if not network.measured:
        return
    latency = max(network.measured, key=lambda pair: abs(pair.found_ms - pair.asked_ms))
    tell(
        f"measured: one way {latency.asked_ms:g} ms -> {latency.found_ms:.3f} ms "
        f"({latency.source} to {latency.target}, the worst of {len(network.measured)})"
        + _worst_rate(network.measured)
    )


def _worst_rate(measured: Sequence[Measured]) -> str:
    rates = [
        (abs(pair.found_mbit / pair.asked_mbit - 1), pair.asked_mbit, pair.found_mbit)
        for pair in measured
        if pair.asked_mbit and pair.found_mbit
    ]
    if not rates:
        return ""
    _, asked, found = max(rates)
    return f", {asked:g} Mbit/s -> {found:.1f}"


def _cores(text: str) -> float:
    try:
        cores = float(text)
    except ValueError:
        cores = 0.0
    if not 0.01 <= cores <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of cores such as 0.5")
    return cores
