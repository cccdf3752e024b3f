"""Devices joined by emulated links, from the shell.

    python -m bench.links check --devices 4 --link 1ms/300mbit
    python -m bench.links up    --profile home-wifi
    python -m bench.links run   --link 5ms/300mbit --until 0 -- ping -c3 {address:1} -- sleep 60

``run`` starts one command on every device, or one for each, with ``--`` between them. In it
``{i}`` is the device's number, ``{address}`` its address and ``{address:2}`` that of device 2;
``{listen}`` is the HOST:PORT for a service of its own, ``{peer:2}`` where it reaches device 2's
and ``{peers}`` where it reaches all others', with commas. Without root there are no namespaces
but relays, and only ``{listen}``, ``{peer:2}`` and ``{peers}`` lead over a link.

As a library: :func:`bench.net.network.emulate`.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.lib.command import end_like_a_command, new_parser
from bench.lib.record import Record, add_json_option
from bench.net.network import Network, emulate
from bench.net.options import (
    add_link_options,
    chosen_shares,
    chosen_topology,
    show_network,
)
from bench.net.spec import LinkError

_PLACE = re.compile(r"\{(i|listen|peers|address(?=[:}])|peer(?=:))(?::(\d{1,4}))?\}")


def check(network: Network, arguments: argparse.Namespace) -> int:
    """Print what was measured; last, as one JSON line."""
    print("from  to   one way asked   found ms   Mbit/s asked      found   lost")
    for pair in network.measured:
        rates = (
            "-" if rate is None else f"{rate:.1f}" for rate in (pair.asked_mbit, pair.found_mbit)
        )
        asked, found = rates
        print(
            f"{pair.source:4d} {pair.target:3d} {pair.asked_ms:15g} {pair.found_ms:10.3f} "
            f"{asked:>14} {found:>10} {pair.lost:6d}"
        )
    pairs = [asdict(pair) for pair in network.measured]
    body = {"backend": network.backend.name, "reason": network.reason, "pairs": pairs}
    arguments.record.finish(body)
    return 0


def up(network: Network, _: argparse.Namespace) -> int:
    """Tell how to get onto each device, and stay until a signal comes."""
    for device in network.devices:
        others = [i for i in range(len(network.devices)) if i != device.index]
        if device.namespace is None:
            ways = (f"{network.reach(i, device.index)} from device {i}" for i in others)
            print(f"device {device.index}: listens on {device.listen}, is at {', '.join(ways)}")
        else:
            print(f"device {device.index}: {device.address}  nsenter --net={device.namespace.path}")
    print("ready; Ctrl-C removes everything", flush=True)
    signal.pause()
    return 0


def run(network: Network, arguments: argparse.Namespace) -> int:
    """Run the commands; returns the exit code of ``--until``'s device, or the first above 0."""
    processes = []
    for device in network.devices:
        command = arguments.commands[device.index % len(arguments.commands)]
        words = [fill_in(word, network, device.index) for word in command]
        stdin = None if device.index == (arguments.until or 0) else subprocess.DEVNULL
        try:
            processes.append(device.popen(words, stdin=stdin))
        except OSError as exc:
            raise LinkError(f"device {device.index}: {words[0]}: {exc.strerror}") from exc
    if arguments.until is not None:
        return _code(processes[arguments.until])
    return next((code for code in map(_code, processes) if code), 0)


def fill_in(word: str, network: Network, device: int) -> str:
    """Put a device's values in the places of a word; other braces stay.

    Raises:
        LinkError: a place names a device that is not there.
    """

    def value(match: re.Match[str]) -> str:
        name, number = match[1], int(match[2] or device)
        if number >= len(network.devices):
            raise LinkError(f"{match[0]}: there are devices 0 to {len(network.devices) - 1}")
        match name:
            case "i":
                return str(device)
            case "address":
                return network.devices[number].address
            case "listen":
                return network.devices[device].listen
            case "peer":
                return network.reach(device, number)
            case _:
                others = (i for i in range(len(network.devices)) if i != device)
                return ",".join(network.reach(device, other) for other in others)

    return _PLACE.sub(value, word)


def main(argv: Sequence[str]) -> int:
    """Parse arguments, make the network, do what was asked."""
    parser = new_parser("bench.links", __doc__)
    actions = parser.add_subparsers(required=True, dest="action", metavar="ACTION")
    parsers = {}
    for name, text in (
        ("check", "measure every pair and print it"),
        ("up", "make the links and keep them until Ctrl-C"),
        ("run", "run commands on the devices"),
    ):
        parsers[name] = actions.add_parser(name, help=text)
        add_link_options(parsers[name])
    add_json_option(parsers["check"])
    parsers["run"].add_argument(
        "--until", type=int, metavar="I", help="end with device I's command (default: all)"
    )
    options, commands = split_commands(argv)
    arguments = parser.parse_args(options)
    topology = chosen_topology(arguments)
    shares = chosen_shares(arguments, topology.devices)
    if arguments.action == "check":
        arguments.record = Record("links", options, arguments)
    if arguments.action == "run":
        check_commands(arguments, commands, topology.devices)
    arguments.commands = commands
    with emulate(topology, backend=arguments.backend, shares=shares) as network:
        show_network(network)
        return {"check": check, "up": up, "run": run}[arguments.action](network, arguments)


def check_commands(
    arguments: argparse.Namespace, commands: Sequence[Sequence[str]], devices: int
) -> None:
    """Check what ``run`` is to run.

    Raises:
        LinkError: the number of commands or ``--until`` does not suit the devices.
    """
    if len(commands) not in (1, devices):
        raise LinkError(
            f"{len(commands)} commands for {devices} devices: expected one for all, "
            "or one for each, behind --"
        )
    if arguments.until is not None and not 0 <= arguments.until < devices:
        raise LinkError(f"--until {arguments.until}: no such device")


def split_commands(argv: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Split at each ``--``: options first, then commands, none of them empty."""
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts[0], [part for part in parts[1:] if part]


def _code(process: subprocess.Popen[Any]) -> int:
    """The exit code as a shell has it."""
    code = process.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
