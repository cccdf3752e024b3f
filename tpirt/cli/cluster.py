"""``tpirt cluster``: make a cluster, invite devices into it, list and revoke their certificates."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tpirt.cli.options import (
    Commands,
    add_identity_option,
    add_parser,
    add_search_options,
    address,
    number,
    run_async,
    sentence,
)
from tpirt.errors import IdentityError, TpirtError
from tpirt.terminal import print_whole, table, width
from tpirt.transport.address import DEFAULT_JOIN_PORT, Address

if TYPE_CHECKING:
    from tpirt.identity.registry import Member
    from tpirt.identity.trust import Trust
    from tpirt.transport.address import Endpoint

_MOST_SHOWN = 4  # addresses of this device


def add_command(commands: Commands) -> None:
    """Add ``cluster`` and its actions."""
    parser = add_parser(
        commands,
        "cluster",
        "make a cluster of devices that trust each other; run on its master",
        "tpirt cluster init\n  tpirt cluster invite\n  tpirt cluster status\n"
        "  tpirt cluster revoke kitchen",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(
            name, help=text, description=sentence(text)
        )
        add_identity_option(action)
        action.set_defaults(run=run)
        return action

    init = add("init", _init, "make a cluster whose master is this device")
    init.add_argument("--name", help="name of the cluster (default: this device's host name)")
    invite = add("invite", _invite, "show a code by which one device can join, and wait for it")
    invite.add_argument("--name", help="name of the device (default: its host name)")
    invite.add_argument(
        "--listen",
        type=lambda text: address(text, lowest_port=0, default_port=DEFAULT_JOIN_PORT),
        default=Address("0.0.0.0", DEFAULT_JOIN_PORT),
        metavar="HOST[:PORT]",
        help=f"where the device connects (default: all addresses, port {DEFAULT_JOIN_PORT})",
    )
    invite.add_argument(
        "--minutes",
        type=lambda text: number(text, "minutes", 86_400),
        default=10.0,
        metavar="N",
        help="how long the code is good for (default 10)",
    )
    status = add("status", _status, "show what each device has and does, or why it does not answer")
    add_search_options(status)
    add("list", _list, "list devices: name, identity, days left, address, revoked or not")
    revoke = add("revoke", _revoke, "refuse a device from now on")
    revoke.add_argument("device", metavar="NAME", help="name or identity, as listed")
    rotate = add("rotate", _rotate, "replace keys and certificates: of all devices, or of one")
    rotate.add_argument("device", nargs="?", metavar="NAME", help="name or identity, as listed")


def _trust(arguments: argparse.Namespace) -> Trust:
    from tpirt.identity.names import MASTER
    from tpirt.identity.trust import Trust

    trust = Trust(MASTER, arguments.identity)
    trust.insecure = False  # whatever the environment says: this is about certificates
    return trust


def _init(arguments: argparse.Namespace) -> None:
    from tpirt.cluster.machine import host_name
    from tpirt.cluster.membership import create_cluster

    trust = _trust(arguments)
    identity = create_cluster(trust, arguments.name or host_name())
    print(
        f"cluster {identity.certificate.name}: keys in {trust.folder}; keep a copy of that folder "
        "in a safe place\nnext: tpirt cluster invite"
    )


def _invite(arguments: argparse.Namespace) -> None:
    from tpirt.cluster import membership  # before SIGINT can interrupt the import

    membership.authority_of(_trust(arguments))
    run_async(_invited(arguments))


async def _invited(arguments: argparse.Namespace) -> None:
    from tpirt.cluster.membership import issuer
    from tpirt.identity.join import new_code
    from tpirt.transport.joining import Invitation

    members: list[Member] = []
    code = new_code()
    invitation = Invitation(code, issuer(_trust(arguments), arguments.name, members.append))
    bound = await invitation.listen(arguments.listen)
    print(f"On the device that is to join, within {arguments.minutes:g} minutes:\n")
    for where in _reached_at(bound):
        print_whole(f"  tpirt peer --join {where}/{code}")
    print("\n(in a clone of tpirt: scripts/launch_peer.sh instead of tpirt peer)", flush=True)
    await invitation.joined(60 * arguments.minutes)
    print(f"{members[0].name} has joined ({members[0].identity})\nnext: tpirt chat --discover")


def _reached_at(bound: list[Endpoint]) -> list[Address]:
    """Where others reach what listens on ``bound``, the likeliest first."""
    from tpirt.transport.address import own_hosts

    (first, *_), port = bound, bound[0].where[1]
    hosts = own_hosts()[:_MOST_SHOWN] if first.is_any else [first.host]
    return [Address(host, port) for host in hosts]


def _status(arguments: argparse.Namespace) -> None:
    from tpirt.cluster import discovery, membership  # noqa: F401 - before SIGINT can interrupt the import
    from tpirt.transport import grpc  # noqa: F401

    membership.authority_of(_trust(arguments))
    run_async(_shown(arguments))


async def _shown(arguments: argparse.Namespace) -> None:
    from tpirt.cli.devices import show_status, surveyed

    found, notes = await surveyed(arguments, _trust(arguments), strangers=False)
    show_status(found, notes, json_wanted=arguments.json)


def _list(arguments: argparse.Namespace) -> None:
    from tpirt.cluster.membership import authority_of

    trust = _trust(arguments)
    name, members = authority_of(trust).name, trust.registry.members()
    print(f"cluster {name}")
    if not members:
        print("no device has joined yet; next: tpirt cluster invite")
        return
    rows = [("device", "identity", "certificate", "address")]
    for each in members:
        state = f"revoked {each.revoked[:10]}" if each.revoked else f"{each.days_left} days left"
        rows.append((each.name, each.identity, state, each.address or "not met yet"))
    print("\n".join(table(rows, left=4, columns=width(sys.stdout))))


def _revoke(arguments: argparse.Namespace) -> None:
    member = _trust(arguments).registry.revoke(arguments.device)
    print(
        f"{member.name} ({member.identity}) is refused from now on; a chat that uses it goes on "
        "until it ends"
    )


def _rotate(arguments: argparse.Namespace) -> None:
    from tpirt.cluster import membership, renewal  # noqa: F401 - before SIGINT can interrupt it
    from tpirt.transport import grpc  # noqa: F401

    run_async(_rotated(arguments))


async def _rotated(arguments: argparse.Namespace) -> None:
    from tpirt.cluster.discovery import client_of
    from tpirt.cluster.membership import authority_of
    from tpirt.cluster.renewal import renew
    from tpirt.identity.trust import IDENTITY_FILE

    trust = _trust(arguments)
    authority, registry = authority_of(trust), trust.registry
    chosen = [each for each in registry.members() if not each.revoked]
    if arguments.device:
        chosen = [registry.find(arguments.device)]
        if date := chosen[0].revoked[:10]:
            raise IdentityError(
                f"{chosen[0].name} was revoked on {date}, so its certificate is not replaced; "
                "invite it again with `tpirt cluster invite`"
            )
    if not arguments.device and (own := trust.identity) is not None:
        path = trust.folder / IDENTITY_FILE
        trust.replace(authority.issue_own(path, own.subject.identity))
        print("master: replaced")
    failed = []
    for member in chosen:
        try:
            client = client_of(member.identity, trust)
            try:
                until = (await renew(client, trust, member)).expires
            finally:
                await client.aclose()
            print(f"{member.name}: replaced, until {until:%Y-%m-%d}")
        except TpirtError as exc:
            failed.append(f"{member.name}: {exc}")
    if failed:
        raise IdentityError("not replaced: " + "; ".join(failed))
