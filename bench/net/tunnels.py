"""Links as a program of ours makes them, between TUN devices: any topology, on any Linux kernel.

The forwarder is a small C program, compiled at first use, or the same in Python where there is no
compiler. It is the router: no packet crosses a namespace by itself.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.net.namespace import Namespace, Tunnel, end_with_parent
from bench.net.spec import Link, LinkError, Topology

_HERE = Path(__file__).parent
_NO_LINK = -1


@dataclass(frozen=True)
class Forwarded:
    """What the forwarder did; lateness is how long after its time a packet was handed over."""

    packets: int
    wire_bytes: int
    dropped: int
    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    cpu_s: float


class TunnelBackend:
    """One TUN device in each namespace and the forwarder between them."""

    def __init__(self, namespaces: list[Namespace], compiled: bool = True):
        """Begin without any link; see :meth:`change`.

        Raises:
            LinkError: no TUN device can be made here, or, if ``compiled``, nothing be compiled.
        """
        with ExitStack() as stack:
            self._tunnels = [
                _closed_with(stack, Tunnel(namespace, device))
                for device, namespace in enumerate(namespaces)
            ]
            command = [str(_compiled())] if compiled else _interpreted()
            fds = [tunnel.fd for tunnel in self._tunnels]
            self._process = subprocess.Popen(
                [*command, *map(str, fds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C is ours to see
                preexec_fn=end_with_parent,
            )
            stack.callback(self._end)
            self._stack = stack.pop_all()
        self.name = "TUN devices and the " + ("C" if compiled else "Python") + " forwarder"
        self._cpu_s = 0.0

    def change(self, topology: Topology) -> None:
        """Have these links from now on; what is under way still takes the old ones."""
        # A lost segment of 64 KiB would be 45 lost packets: with losses, packets are as on a wire.
        whole = all(link.loss_percent == 0 for link in topology.all_links())
        for tunnel in self._tunnels:
            tunnel.offload(whole)
        self._ask("links " + _as_numbers(topology))

    def forwarded(self) -> Forwarded:
        """What was done since the last call."""
        packets, wire_bytes, dropped, p50, p99, latest = map(int, self._ask("stats").split())
        before, self._cpu_s = self._cpu_s, self.cpu_s()
        return Forwarded(
            packets,
            wire_bytes,
            dropped,
            late_p50_ms=p50 / 1e6,
            late_p99_ms=p99 / 1e6,
            late_max_ms=latest / 1e6,
            cpu_s=self._cpu_s - before,
        )

    def cpu_s(self) -> float:
        """CPU time of the forwarder so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """End the forwarder and remove the devices."""
        self._stack.close()

    def _ask(self, order: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise LinkError(f"the forwarder of the emulated links ended with exit code {code}")
        return answer

    def _end(self) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def _closed_with(stack: ExitStack, tunnel: Tunnel) -> Tunnel:
    stack.callback(tunnel.close)
    return tunnel


def _as_numbers(topology: Topology) -> str:
    """The topology as the forwarder reads it; see the head of ``forwarder.c``."""
    links: list[Link] = []

    def number(link: Link | None) -> int:
        if link is None:
            return _NO_LINK
        links.append(link)
        return len(links) - 1

    up = [number(link) for link in topology.up]
    down = [number(link) for link in topology.down]
    pairs = {pair: number(link) for pair, link in topology.pairs.items()}
    routes = []
    for source in range(topology.devices):
        for target in range(topology.devices):
            if (source, target) in pairs:
                routes += [pairs[source, target], _NO_LINK]
            else:
                routes += [up[source], down[target]]
    values: list[object] = [len(links)]
    for link in links:
        ns_per_byte = 8e3 / (link.rate_mbit or math.inf)
        values += [link.latency_ms * 1e6, link.jitter_ms * 1e6, ns_per_byte]
        values += [link.loss_percent / 100, int(link.reorder)]
        values += [link.flip_percent / 100, link.replay_percent / 100]
    return " ".join(map(str, values + routes))


def _interpreted() -> list[str]:
    # -P: the folder of the script is no place to import from.
    return [sys.executable, "-P", str(_HERE / "forwarder.py")]


def _compiled() -> Path:
    """Compile the forwarder, or find it compiled."""
    source = _HERE / "forwarder.c"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    program = home / "tpirt" / "bench" / f"forwarder-{zlib.crc32(source.read_bytes()):08x}"
    if program.exists():
        return program
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise LinkError("no C compiler (cc, gcc, clang) was found")
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        made = Path(folder) / program.name
        command = [compiler, "-O2", "-o", str(made), str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.splitlines() or ["no reason given"])[0]
            raise LinkError(f"{compiler} cannot compile {source.name}: {reason}")
        made.rename(program)  # two runs at once each put a whole file there
    return program
