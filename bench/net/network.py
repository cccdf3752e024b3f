"""Devices joined by emulated links: what benchmarks and the shell use.

with emulate(parse_topology("1ms/300mbit", 2)) as network:
    peer = network.devices[1].popen(["tpirt", "peer", "--listen", network.devices[1].listen])
    network.reach(0, 1)  # where device 0 finds what listens on device 1
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bench.net import relay
from bench.net.namespace import Namespace, address, end_with_parent, traffic
from bench.net.netem import NetemBackend, check_supported
from bench.net.probe import Measured, check, measure_packets, measure_streams
from bench.net.relay import LoopbackBackend, RelayBackend
from bench.net.shares import Share, ShareGroup, remove_leftovers
from bench.net.spec import LinkError, NoRightsError, Topology
from bench.net.tunnels import Forwarded, TunnelBackend
from tpirt.identity.trust import INSECURE

_T = TypeVar("_T")

BACKENDS = ("netem", "tun", "tun-python", "relay")
LOOPBACK = "loopback"  # no links; never chosen by itself
PORT = 50051
_LEAVE_S = 5.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PAUSES_S = (0.1, 0.5, 2.0, 0.0)  # after a bad measurement: the machine may be busy for a moment
# Delays as measured are those of the link, not of a sender that paces itself: BBR would, and some
# systems have it as their default. Without losses the two behave alike.
_CONGESTION_CONTROLS = ("cubic", "reno")


class Backend(Protocol):
    """What makes the links."""

    name: str

    def change(self, topology: Topology) -> None:
        """Have these links from now on.

        Raises:
            LinkError: it cannot make them.
        """

    def close(self) -> None:
        """Remove everything."""


class Device:
    """One device; processes started on it see its network only.

    Attributes:
        index: from 0 on.
        address: its IPv4 address.
        listen: ``host:port`` for the one service that others are to reach.
    """

    def __init__(self, index: int, host: str, port: int, namespace: Namespace | None):
        self.index = index
        self.address = host
        self.listen = f"{host}:{port}"
        self.port = port
        self.namespace = namespace
        self.share: ShareGroup | None = None
        self._processes: list[subprocess.Popen[Any]] = []

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command; it is ended with the network. ``options`` are those of ``Popen``.

        Peers serve without certificates, unless ``env`` says otherwise.
        """
        options["env"] = {INSECURE: "1", **options.get("env", os.environ)}
        with _signals_held():
            process = subprocess.Popen(
                command, preexec_fn=self._enter, start_new_session=True, **options
            )
            self._processes.append(process)
        return process

    def run(self, work: Callable[[], _T]) -> _T:
        """Call ``work`` in this process; the sockets it opens are on the device's network."""
        return work() if self.namespace is None else self.namespace.run(work)

    def stop(self) -> None:
        """End its processes, and theirs."""
        for process in self._processes:
            _signal(process, signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVE_S)
            _signal(process, signal.SIGKILL)  # also what it left behind
            process.wait()
        self._processes.clear()

    def _enter(self) -> None:
        end_with_parent()
        if self.namespace is not None:
            self.namespace.enter()
        if self.share is not None:
            self.share.enter()


class Network:
    """Devices, their links, and what was measured of them; made by :func:`emulate`."""

    def __init__(self, topology: Topology, backend: Backend, devices: list[Device], reason: str):
        self.topology = topology
        self.devices = devices
        self.backend = backend
        self.reason = reason
        self.measured: list[Measured] = []

    def change(self, topology: Topology) -> None:
        """Have other links between the same devices, and measure them.

        Raises:
            LinkError: they cannot be made, or are not what was asked for.
        """
        self.backend.change(topology)
        self.topology = topology
        for pause_s in _PAUSES_S:
            self.measured = self._measure()
            if not any(fault for pair in self.measured for fault in pair.faults()):
                return
            time.sleep(pause_s)
        check(self.measured)

    def _measure(self) -> list[Measured]:
        if isinstance(self.backend, RelayBackend):
            return measure_streams(self.topology, self.backend.route)
        if isinstance(self.backend, LoopbackBackend):
            return []
        return measure_packets(self.topology, [device.run for device in self.devices])

    def reach(self, source: int, target: int) -> str:
        """``host:port`` at which ``source`` reaches what listens on ``target``."""
        device = self.devices[target]
        if isinstance(self.backend, RelayBackend):
            return f"{relay.HOST}:{self.backend.route(source, target, device.port)}"
        return device.listen

    def traffic(self, device: int) -> tuple[int, int]:
        """Bytes that a device has sent and received so far, headers included where there are.

        On loopback nobody counts them: both are 0.
        """
        if isinstance(self.backend, RelayBackend):
            return self.backend.traffic(device)
        if isinstance(self.backend, LoopbackBackend):
            return 0, 0
        return self.devices[device].run(traffic)

    def forwarded(self) -> Forwarded | None:
        """What the forwarder did since the last call, where there is one."""
        return self.backend.forwarded() if isinstance(self.backend, TunnelBackend) else None

    def emulator_cpu_s(self) -> float:
        """CPU time that the forwarder has taken so far; 0 where there is none."""
        return self.backend.cpu_s() if isinstance(self.backend, TunnelBackend) else 0.0


@contextmanager
def emulate(
    topology: Topology, *, backend: str = "auto", shares: Sequence[Share] | None = None
) -> Iterator[Network]:
    """Make devices and links, measure them, and remove everything at the end.

    Args:
        topology: the links.
        backend: one of ``BACKENDS``, ``auto`` for the first that can be had, or ``LOOPBACK``.
        shares: what each device gets of this machine; all of it when absent.

    Raises:
        LinkError: no such links can be made here, or they are not what was asked for.
    """
    remove_leftovers()
    with ExitStack() as stack:
        network = _make(topology, backend, stack)
        for device, share in zip(network.devices, shares or (), strict=False):
            if share != Share():
                device.share = ShareGroup(device.index, share)
                stack.callback(device.share.close)
        for device in network.devices:
            stack.callback(device.stop)
        network.change(topology)
        yield network


def _make(topology: Topology, choice: str, stack: ExitStack) -> Network:
    """Build the chosen backend, or the first that works."""
    reasons: list[str] = []
    no_rights = False
    for name in BACKENDS if choice == "auto" else (choice,):
        attempt = ExitStack()
        try:
            network = _attempt(name, topology, "; ".join(reasons), attempt)
        except LinkError as exc:
            attempt.close()
            reasons.append(str(exc))
            no_rights = no_rights or isinstance(exc, NoRightsError)
        except BaseException:
            attempt.close()
            raise
        else:
            stack.push(attempt)
            return network
    text = f"these links cannot be made here: {'; '.join(reasons)}"
    if no_rights:
        raise LinkError(
            f"{text}; run as root or under `unshare --user --map-root-user`, or take --backend "
            "relay, which needs no rights and loses no packets"
        )
    raise LinkError(text if choice == "auto" else f"{text}; --backend auto takes what there is")


def _attempt(name: str, topology: Topology, reason: str, stack: ExitStack) -> Network:
    backend: Backend
    if name in ("relay", LOOPBACK):
        backend = (RelayBackend if name == "relay" else LoopbackBackend)(topology.devices)
        stack.callback(backend.close)
        devices = [Device(i, relay.HOST, port, None) for i, port in enumerate(backend.ports)]
    else:
        if name == "netem":
            check_supported(topology)
        namespaces: list[Namespace] = []
        for _ in range(topology.devices):
            namespaces.append(Namespace())
            stack.callback(namespaces[-1].close)
            namespaces[-1].run(_choose_congestion_control)
        if name == "netem":
            backend = NetemBackend(namespaces)
        else:
            backend = TunnelBackend(namespaces, compiled=name == "tun")
        stack.callback(backend.close)
        devices = [Device(i, address(i), PORT, each) for i, each in enumerate(namespaces)]
    backend.change(topology)
    return Network(topology, backend, devices, reason)


def _choose_congestion_control() -> None:
    for name in _CONGESTION_CONTROLS:
        with contextlib.suppress(OSError):
            Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text(name)
            return


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals that end this process wait until the block has ended.

    Between a child's start and its being known here nothing may unwind this process: nobody would
    end the child. A signal mask would not do: another thread would take the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    held = {n: handler for n, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in held:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def _signal(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Send a signal to a process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
