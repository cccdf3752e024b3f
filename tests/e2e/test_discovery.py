"""Devices that find each other on a network, as from the README."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.net.namespace import INTERFACE
from tests.support.lan import LanDevice, lan
from tpirt.cluster.discovery import NONE, OURS
from tpirt.testing.models import make_model

NAME = socket.gethostname()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LanDevice]]:
    """A master, and two devices that joined its cluster, whose host name is the same."""
    with lan(4, tmp_path_factory.mktemp("lan")) as (master, *others):
        master.good("cluster", "init", "--name", "home")
        for device in others[:2]:
            join(master, device)
        yield [master, *others]


def join(master: LanDevice, device: LanDevice) -> None:
    invitation = master.start("cluster", "invite")
    assert invitation.stdout is not None
    where = next(
        found[1] for line in invitation.stdout if (found := re.search(r"--join (\S+)", line))
    )
    serve(device, "--join", where)
    assert "has joined" in invitation.communicate(timeout=60)[0]
    device.stop()


def serve(device: LanDevice, *options: str) -> subprocess.Popen[str]:
    peer = device.start("peer", "--threads", "1", "--quiet", *options)
    assert peer.stdout is not None
    line = peer.stdout.readline()
    assert line.startswith("listening on"), (line, peer.communicate()[1])
    return peer


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


def swap(first: LanDevice, second: LanDevice) -> None:
    """Exchange the addresses of two devices."""
    for device in (first, second):
        device.ip("address", "flush", "dev", INTERFACE, "scope", "global")
    first.address, second.address = second.address, first.address
    for device in (first, second):
        device.ip("address", "add", f"{device.address}/24", "dev", INTERFACE)
