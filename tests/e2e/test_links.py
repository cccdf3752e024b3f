"""Emulated links as they are: built, measured, used, and gone afterwards, however a run ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from bench.links import fill_in
from bench.net import netem
from bench.net.namespace import Namespace
from bench.net.network import Network, emulate
from bench.net.shares import Share, ShareGroup, remove_leftovers
from bench.net.spec import Link, LinkError, parse_topology, uniform
from bench.net.tunnels import TunnelBackend
from tests.support.nightly import nightly
from tpirt.testing.processes import (
    descendants,
    killed_at_exit,
    run_python,
    start_python,
    survivors,
    wait_for,
)

ROOT = Path(__file__).parents[2]
SLOW = "20ms/20mbit"  # far from what a busy machine may add
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(scope="module", autouse=True)
def _rights() -> None:
    try:
        with closing(Namespace()):
            pass
    except LinkError as exc:
        pytest.skip(str(exc))


@pytest.fixture(params=["tun", nightly("tun-python"), "netem", nightly("relay")])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        with emulate(parse_topology("0ms", 2), backend=name):
            return name
    except LinkError as exc:
        pytest.skip(str(exc))


def exchange(network: Network, source: int, target: int) -> bytes:
    """Send from a device to another and back, over TCP."""
    device = network.devices[target]
    with device.run(lambda: socket.create_server(("", device.port))) as server:
        host, _, port = network.reach(source, target).rpartition(":")
        near = network.devices[source].run(
            lambda: socket.create_connection((host, int(port)), timeout=10)
        )
        far, _ = server.accept()
        with near, far:
            near.sendall(b"there" * 20_000)
            assert far.recv(100_000, socket.MSG_WAITALL) == b"there" * 20_000
            far.sendall(b"back")
            near.settimeout(10)
            return near.recv(4, socket.MSG_WAITALL)


def test_devices_talk_over_what_was_measured(backend: str) -> None:
    with emulate(parse_topology(SLOW, 2), backend=backend) as network:
        assert len(network.measured) == 2
        before = network.traffic(0)
        assert exchange(network, 0, 1) == b"back"
        sent, received = (new - old for new, old in zip(network.traffic(0), before, strict=True))
        assert sent >= 100_000 > received > 0
        network.change(parse_topology("20ms;1:up=10ms/5mbit,down=30ms", 2))
        there, back = network.measured
        assert (there.asked_ms, there.asked_mbit) == (40, None)
        assert (back.asked_ms, back.asked_mbit) == (20, 5)


TUNNELS = pytest.mark.parametrize(
    "backend", ["tun", pytest.param("tun-python", marks=pytest.mark.nightly)]
)


@TUNNELS
def test_pairs_and_no_way(backend: str) -> None:
    with emulate(parse_topology("20ms;0-1:50ms/20mbit;1-2:none", 3), backend=backend) as network:
        assert exchange(network, 0, 1) == b"back"
        device = network.devices[2]
        with (
            device.run(lambda: socket.create_server(("", device.port))),
            pytest.raises(TimeoutError),
        ):
            network.devices[1].run(
                lambda: socket.create_connection((device.address, device.port), timeout=0.3)
            )
        forwarded = network.forwarded()
        assert forwarded is not None
        assert forwarded.dropped > 0


def test_losses_are_had() -> None:
    with emulate(parse_topology("10ms/loss30%", 2), backend="tun") as network:
        forwarded = network.forwarded()
        assert forwarded is not None
        assert 0 < forwarded.dropped < forwarded.packets


@TUNNELS
@pytest.mark.parametrize(
    ("change", "arrived"), [("flip100%", None), ("replay100%", [b"first", b"first"])]
)
def test_what_tcp_carries_is_changed(
    backend: str, change: str, arrived: list[bytes] | None
) -> None:
    with emulate(parse_topology(f"1ms;0>1:1ms/{change}", 2), backend=backend) as network:
        target = network.devices[1]
        with target.run(lambda: socket.create_server(("", target.port))) as server:
            near = network.devices[0].run(
                lambda: socket.create_connection((target.address, target.port), timeout=10)
            )
            far, _ = server.accept()
            with near, far:
                far.settimeout(10)
                got = []
                for word in (b"first", b"later"):
                    near.sendall(word)
                    got.append(far.recv(5, socket.MSG_WAITALL))
                    far.sendall(b"back")
                    assert near.recv(4, socket.MSG_WAITALL) == b"back"
    if arrived is not None:
        assert got == arrived
    else:
        differing = [
            sum((a ^ b).bit_count() for a, b in zip(old, new, strict=True))
            for old, new in zip((b"first", b"later"), got, strict=True)
        ]
        assert differing == [1, 1]


@TUNNELS
@pytest.mark.parametrize("reorder", ["", "/reorder"])
def test_jitter_reorders_only_when_asked_to(backend: str, reorder: str) -> None:
    with emulate(parse_topology("40ms±4ms" + reorder, 2), backend=backend) as network:
        device = network.devices[1]
        near, far = (
            each.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            for each in network.devices
        )
        with near, far:
            far.bind((device.address, device.port))
            far.settimeout(10)
            for number in range(100):
                near.sendto(bytes([number]), far.getsockname())
            came = [far.recv(1)[0] for _ in range(100)]
    assert (came == sorted(came)) is not bool(reorder)


def test_what_is_not_as_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    change = TunnelBackend.change
    wrong = uniform(Link(30.0), 2)
    monkeypatch.setattr(TunnelBackend, "change", lambda self, _: change(self, wrong))
    with (
        pytest.raises(LinkError, match="device 0 to 1 is not what was asked for: one-way latency"),
        emulate(parse_topology("20ms", 2), backend="tun"),
    ):
        pytest.fail("it was not refused")
    assert not descendants()


def test_runs_do_not_see_each_other() -> None:
    with (
        emulate(parse_topology(SLOW, 2), backend="tun") as one,
        emulate(parse_topology("60ms", 3), backend="tun") as other,
    ):
        one.devices[0].run(lambda: None)
        assert one.devices[1].address == other.devices[1].address
        device = other.devices[1]
        with (
            device.run(lambda: socket.create_server(("", device.port))),
            pytest.raises(ConnectionRefusedError),
        ):
            one.devices[0].run(
                lambda: socket.create_connection((device.address, device.port), timeout=5)
            )
        assert exchange(other, 0, 1) == b"back"
        assert exchange(one, 0, 1) == b"back"


@contextmanager
def links(*arguments: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """``python -m bench.links``."""
    with killed_at_exit(
        start_python(
            *("-m", "bench.links", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            **options,
        )
    ) as process:
        yield process


def sleepers(pid: int) -> list[psutil.Process]:
    return descendants(pid, lambda each: each.name() == "sleep")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.nightly),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.nightly),
        (signal.SIGKILL, -9),
    ],
)
def test_nothing_is_left(number: signal.Signals, code: int) -> None:
    limits = ("--cores", "0.5") if has_cgroups() else ()
    with links("run", "--link", SLOW, *limits, "--", "sleep", "1000") as process:
        wait_for(lambda: len(sleepers(process.pid)) == 2)
        everything = descendants(process.pid)
        assert len(everything) == 3  # and the forwarder
        process.send_signal(number)
        assert process.wait(20) == code
        assert not survivors(everything)
    if number is signal.SIGKILL:
        remove_leftovers()  # as the next run does
    assert not list(CGROUPS.glob(f"**/tpirt-links-{process.pid}-*"))


def test_a_signal_while_a_process_starts_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:  # in the child, before it has become the command
        os.kill(os.getppid(), signal.SIGHUP)

    def unwind(*_: object) -> None:
        raise ZeroDivisionError

    before = signal.signal(signal.SIGHUP, unwind)
    done = threading.Event()
    other = threading.Thread(target=done.wait)  # which might take the signal
    other.start()
    try:
        with emulate(parse_topology("20ms", 2), backend="tun") as network:
            device = network.devices[0]
            assert device.namespace is not None
            monkeypatch.setattr(device.namespace, "enter", interrupt)
            with pytest.raises(ZeroDivisionError):
                device.popen(["sleep", "1000"])
            monkeypatch.undo()
            wait_for(lambda: sleepers(os.getpid()))
    finally:
        signal.signal(signal.SIGHUP, before)
        done.set()
        other.join()
    assert not descendants()


def test_an_exception_leaves_nothing() -> None:
    def crash() -> None:
        with emulate(parse_topology(SLOW, 2), backend="tun") as network:
            network.devices[0].popen(["sh", "-c", "sleep 1000 & sleep 1000"])
            wait_for(lambda: len(sleepers(os.getpid())) == 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert not descendants()


def test_check_prints_a_table_and_json() -> None:
    with links("check", "--devices", "2", "--link", SLOW) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert [pair["asked_ms"] for pair in result["pairs"]] == [20.0, 20.0]
    assert "measured: one way 20 ms" in err


@pytest.mark.parametrize("backend", ["auto", nightly("relay")])
def test_run_starts_commands_and_returns_their_code(backend: str) -> None:
    arguments = ("run", "--backend", backend, "--link", SLOW, "--until", "1", "--")
    with links(
        *arguments, "sleep", "1000", "--", "sh", "-c", "echo {i} {peers}; exit 7"
    ) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 7, err
    number, _, reach = out.strip().partition(" ")
    assert number == "1"
    assert reach.rpartition(":")[2].isdecimal()


def test_places_of_a_command() -> None:
    with emulate(parse_topology("0ms", 3), backend="tun") as network:

        def filled(word: str) -> str:
            return fill_in(word, network, 1)

        assert filled("{i}/{address}/{address:0}") == "1/10.0.0.2/10.0.0.1"
        assert filled("{listen} {peer:2}") == "10.0.0.2:50051 10.0.0.3:50051"
        assert filled("{peers}") == "10.0.0.1:50051,10.0.0.3:50051"
        assert filled('{"a": {x}} {peer} {address:}') == '{"a": {x}} {peer} {address:}'
        with pytest.raises(LinkError, match="devices 0 to 2"):
            filled("{address:3}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("check", "--link", "fast"), "'fast' is no latency"),
        (("run", "--devices", "3", "--", "true", "--", "true"), "2 commands for 3 devices"),
        (("run", "--until", "5", "--", "true"), "no such device"),
        (("run", "--link", SLOW, "--", "no-such-program"), "No such file"),
        (("check", "--backend", "relay", "--link", "1ms/loss1%"), "needs namespaces"),
        (("check", "--backend", "relay", "--link", "1ms/flip1%"), "needs namespaces"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], complaint: str) -> None:
    with links(*arguments) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert complaint in err.splitlines()[-1]
    assert "Traceback" not in err


WITHOUT_RIGHTS = """
import ctypes, runpy
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0
runpy.run_module("bench.links", run_name="__main__", alter_sys=True)
"""


def test_without_rights_it_says_what_would_work() -> None:
    """Without any capability, as a user's process is."""

    def check(*options: str) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = run_python(
            "-c", WITHOUT_RIGHTS, "check", *options, text=True, cwd=ROOT
        )
        return done

    done = check("--backend", "tun")
    assert done.returncode == 2
    assert "no network namespace could be made: Operation not permitted" in done.stderr
    assert "--backend relay, which needs no rights" in done.stderr
    done = check("--link", SLOW)
    assert done.returncode == 0, done.stderr
    assert "TCP relays on loopback" in done.stderr


def has_cgroups() -> bool:
    try:
        with closing(ShareGroup(99, Share(cores=0.5))):
            return True
    except LinkError:
        return False


def test_a_device_gets_its_share() -> None:
    try:
        group = ShareGroup(0, Share(cores=0.5, disk_bytes_per_s=10_000_000))
    except LinkError as exc:
        pytest.skip(str(exc))
    with closing(group):
        process = subprocess.run(
            ["cat", "/proc/self/cgroup"], preexec_fn=group.enter, capture_output=True, text=True
        )
        assert f"tpirt-links-{os.getpid()}-0" in process.stdout
    assert not list(CGROUPS.glob(f"**/tpirt-links-{os.getpid()}-*"))


def test_netem_joins_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but netem itself, which few virtual machines' kernels have."""
    monkeypatch.setattr(netem, "check_netem", lambda: None)
    monkeypatch.setattr(netem, "netem", lambda _: "pfifo limit 1000")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"`{tool}` is not installed")
    with emulate(parse_topology("0ms", 3), backend="netem") as network:
        assert exchange(network, 1, 2) == b"back"
        assert network.backend.name == "tc netem"
