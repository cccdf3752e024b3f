"""Devices that find each other on a network, as from the README."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from zeroconf import DNSAddress, DNSOutgoing, DNSPointer, DNSRecord, DNSService, DNSText

from bench.net.namespace import INTERFACE
from tests.support.lan import LanDevice, lan
from tpirt.cluster.discovery import NONE, OURS
from tpirt.testing.models import make_model
from tpirt.transport.mdns import SERVICE

NAME = socket.gethostname()
QUIETLY = ("--threads", "1", "--quiet")
NOBODY = "no device was found; `tpirt cluster invite` lets one join, `tpirt peer` starts it\n"
HOSTILE = (b"name=\x1b[31mkitchen\n\r" + b"x" * 200, b"version=\xff\x00", b"protocol")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LanDevice]]:
    """A master, and two devices that joined its cluster, whose host name is the same."""
    with lan(4, tmp_path_factory.mktemp("lan")) as (master, *others):
        master.good("cluster", "init", "--name", "home")
        for device in others[:2]:
            device.join(master, *QUIETLY)
            device.stop()
        yield [master, *others]


def serve(device: LanDevice, *options: str) -> subprocess.Popen[str]:
    return device.serve(*QUIETLY, *options)


def listed(master: LanDevice, *command: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What a command lists, by name and cluster."""
    found = json.loads(master.good(*command, "--json"))
    return {(each["name"], each["cluster"]): each for each in found}


def test_devices_are_found_told_apart_and_used(devices: list[LanDevice], model: Path) -> None:
    master, first, second, stranger = devices
    name, other = NAME, f"{NAME}-2"
    serve(first)
    serve(second, "--listen", "0.0.0.0:50099")  # not where it was met
    serve(stranger, "--insecure")

    found = listed(master, "peers", "--seconds", "2")
    assert set(found) == {(name, OURS), (other, OURS), (name, NONE)}
    assert found[name, OURS]["state"] == found[other, OURS]["state"] == "free"
    assert found[name, OURS]["address"] == f"{first.address}:50051"
    assert found[other, OURS]["address"].endswith(":50099")
    assert found[name, NONE]["state"] == "not used"

    chat = ("chat", "--model", str(model), "--max-tokens", "3", "--threads", "1", "--prompt", "Hi")
    code, _, err = master.run(*chat, "--discover")
    assert code == 0, err
    assert f"using {name} ({first.address}:50051), {other} (" in err
    assert f"not using {name}: not trusted: no certificate" in err
    code, _, err = master.run("chat", "--prompt", "Hi", "--max-tokens", "3")
    assert code == 0, err
    assert f"as last time: --model {model} --discover" in err
    assert f"using {name} (" in err

    # The second device where the first one was met, under the same host name.
    first.stop()
    second.stop()
    swap(first, second)
    master.ip("neighbour", "flush", "all")
    serve(second)
    code, _, err = master.run(*chat, "--peers", name)
    assert code == 2, err
    assert f"{second.address}:50051: another device answers there" in err
    status = listed(master, "cluster", "status", "--seconds", "1")
    assert set(status) == {(name, OURS), (other, OURS)}
    assert status[other, OURS]["state"] == "free"
    (kept,) = status[other, OURS]["models"]
    assert (kept["name"], kept["slices"]) == ("tiny", 1)
    lost = status[name, OURS]
    assert lost["state"] == "no answer"
    assert "another device answers there" in lost["reason"]
    assert lost["met"]
    assert lost["certificate_ends"]
    for device in (second, stranger):
        device.stop()
    swap(first, second)
    master.ip("neighbour", "flush", "all")


def swap(first: LanDevice, second: LanDevice) -> None:
    """Exchange the addresses of two devices."""
    for device in (first, second):
        device.ip("address", "flush", "dev", INTERFACE, "scope", "global")
    first.address, second.address = second.address, first.address
    for device in (first, second):
        device.ip("address", "add", f"{device.address}/24", "dev", INTERFACE)


def test_hostile_announcements(devices: list[LanDevice]) -> None:
    """Thousands of names, control characters and another service's: the device is still found."""
    master, first, _, stranger = devices
    serve(first)
    with shouting(stranger, list(hostile_packets())):
        code, out, err = master.run("peers", "--seconds", "2")
    assert code == 0, err
    assert re.search(rf"^{NAME} +\S+ +free ", out, re.MULTILINE), out
    assert re.search(r"\d+ more announcements were not looked at", err), err
    assert "?[31mkitchen??" in out
    assert len(out.splitlines()) < 2 * 64 + 8
    assert all(char.isprintable() or char == "\n" for char in out + err)
    first.stop()


def hostile_packets() -> Iterator[bytes]:
    """Announcements as raw packets: each of a name, some with all that belongs to a peer."""
    for number in range(3_000):
        yield announcement(f"{number:016x}", complete=number % 4 == 0)
    for label in ("\x1b[2J", "kitchen", "0" * 63, "../../etc"):
        yield announcement(label, complete=True)


def announcement(label: str, complete: bool) -> bytes:
    name = f"{label}.{SERVICE}"
    out = DNSOutgoing(0x8400)
    records: list[DNSRecord] = [DNSPointer(SERVICE, 12, 1, 60, name)]
    if complete:
        text = b"".join(bytes([len(each)]) + each for each in HOSTILE)
        records += [
            DNSService(name, 33, 1, 60, 0, 0, 9, f"{label}.local."),
            DNSText(name, 16, 1, 60, text),
            DNSAddress(f"{label}.local.", 1, 1, 60, socket.inet_aton("10.0.0.4")),
        ]
    for record in records:
        out.add_answer_at_time(record, 0)
    (packet,) = out.packets()
    return packet


@contextmanager
def shouting(device: LanDevice, packets: list[bytes]) -> Iterator[None]:
    """Multicast packets, all of them again and again, from a device."""
    ended = threading.Event()

    def shout() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            out.setsockopt(
                socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(device.address)
            )
            out.bind(("", 5353))
            for packet in itertools.cycle(packets):
                out.sendto(packet, ("224.0.0.251", 5353))
                if ended.wait(0.0005):
                    return

    thread = threading.Thread(target=device.namespace.run, args=(shout,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_without_a_network(tmp_path: Path) -> None:
    """One line, not an error."""
    with lan(1, tmp_path) as (device,):
        device.ip("address", "flush", "dev", INTERFACE)
        code, out, err = device.run("peers", "--seconds", "1")
        assert (code, out) == (0, NOBODY)
        assert "the network cannot be searched (mDNS): this device has no network" in err
        peer = serve(device, "--insecure")
        assert peer.stderr is not None
        while "not announced" not in (line := peer.stderr.readline()):
            assert line
        assert line == (
            "not announced on the network: this device has no network; masters need its address\n"
        )


def test_a_peer_that_does_not_announce_itself(devices: list[LanDevice]) -> None:
    """It is found where it was met last; what nobody met is not."""
    master, first, _, stranger = devices
    serve(first, "--no-announce")
    serve(stranger, "--insecure", "--no-announce")
    found = listed(master, "peers", "--seconds", "1")
    assert found[NAME, OURS]["state"] == "free"
    assert (NAME, NONE) not in found
    first.stop()
    stranger.stop()


def test_mdns_port_in_use(tmp_path: Path) -> None:
    """By a service that shares it with nobody."""
    with lan(1, tmp_path) as (device,):
        owner = device.namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with owner:
            owner.bind(("", 5353))
            code, out, err = device.run("peers", "--seconds", "1")
            assert (code, out) == (0, NOBODY)
            assert err == ("tpirt: the network cannot be searched (mDNS): Address already in use\n")
            peer = serve(device, "--insecure")
            assert peer.stderr is not None
            while "not announced" not in (line := peer.stderr.readline()):
                assert line
            assert "not announced on the network: Address already in use" in line
