"""The faults of :mod:`bench.chaos`: drawn from a seed, begun and mended."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.lib.cgroup import MemoryCgroup
from bench.lib.jumping_clock import set_offset
from bench.net.network import Device, Network
from bench.net.spec import parse_topology
from tpirt.identity.trust import INSECURE

PEERS = 4  # the last one is the spare
MOST = 4  # faults of a round
BASE = "0.2ms/500mbit"
PHASES = ("between", "loading", "prompt", "token", "idle")
LINKS = {
    "cut": "0-{peer}:none",
    "cut to it": "0>{peer}:none",
    "cut from it": "{peer}>0:none",
    "peers cut": "{peer}-{other}:none",
    "throttle": "{peer}:5ms/1mbit",
    "wire flips": f"{{peer}}:{BASE}/flip5%",
    "replay": f"{{peer}}:{BASE}/replay5%",
}
KINDS = (
    *("kill", "freeze", "freeze all", "restarts", "out of memory", "no memory"),
    *LINKS,
    *("bit flip", "truncate", "disk full", "clock"),
    *("master disk full", "master clock", "kill master"),
)
ENDING = ("kill", "restarts", "out of memory", "no memory")  # a peer may end by these
_JUMPS_S = (-315e6, -86_400.0, -60.0, 60.0, 86_400.0, 315e6)
_DISK_BYTES = 64 << 20
_LEFT_BYTES = 4 << 20  # of memory, to what is taken
_HOG = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
open("/proc/self/oom_score_adj", "w").write("-1000")
taken = [b"x" * (1 << 20) for _ in range(64)]
time.sleep(60)
"""


@dataclass(frozen=True)
class Fault:
    """One fault of a round: what, on which peer, from when on, for how long."""

    kind: str
    peer: int
    phase: str
    after_s: float
    lasts_s: float


def draw(seed: int) -> list[Fault]:
    """The faults of a round."""
    chance = random.Random(seed)
    return [
        Fault(
            chance.choice(KINDS),
            chance.randint(1, PEERS),
            chance.choice(PHASES),
            chance.uniform(0.0, 0.3),
            chance.uniform(0.2, 6.0),
        )
        for _ in range(chance.choice((1, 2, 2, 3, MOST)))
    ]


class Peer:
    """A ``tpirt peer`` on a device, with a small disk, a memory limit and clocks of its own."""

    def __init__(self, device: Device, folder: Path, identity: Path, memory: MemoryCgroup):
        self._device = device
        self.disk = folder
        self.store = folder / "store"
        self.memory = memory
        self.clock = folder.parent / f"{folder.name}.clock"
        set_offset(self.clock, 0.0)
        self._log = folder.parent / f"{folder.name}.log"
        self._environment = secured(identity)
        self.process: subprocess.Popen[Any] | None = None
        self.base: tuple[int, int, int] | None = None
        self._starting = threading.Lock()  # several faults may end at once

    def start(self) -> None:
        """Start it if it is not running."""
        with self._starting:
            if self.process is None or self.process.poll() is not None:
                self._start()

    def _start(self) -> None:
        command = [*_elsewhen(1000.0 * self._device.index), sys.executable]
        command += ["-m", "bench.lib.jumping_clock", str(self.clock)]
        command += ["tpirt", "peer", "--listen", self._device.listen, "--no-announce"]
        command += ["--threads", "1", "--store", str(self.store)]
        with open(self._log, "w", encoding="utf-8") as log:
            self.process = self._device.popen(
                command, stdout=log, stderr=log, env=self._environment
            )
        if self.memory.folder is not None:
            (self.memory.folder / "cgroup.procs").write_text(str(self.process.pid))
        self.base = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is running."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    @property
    def log(self) -> str:
        """What it said since it was started."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def listens(self) -> bool:
        """Whether it has begun to listen."""
        return "listening" in self.log

    @property
    def free(self) -> bool:
        """Whether it waits for a master."""
        lines = [line for line in self.log.splitlines() if "serving" in line or "waiting" in line]
        return not lines or "waiting" in lines[-1]

    def figures(self) -> tuple[int, int, int]:
        """Its descriptors, threads and memory."""
        assert self.process is not None
        process = psutil.Process(self.process.pid)
        return process.num_fds(), process.num_threads(), process.memory_info().rss

    def files(self) -> list[Path]:
        """The blocks of its slices, the same ones at every run."""
        return sorted(path for path in self.store.rglob("*.safetensors") if path.is_file())


class Faults:
    """Makes faults happen, and mends them.

    Attributes:
        master: the process whose session the master's processes are.
        chat: the chat in it that a round may kill.
    """

    def __init__(self, network: Network, peers: Sequence[Peer], disk: Path, clock: Path):
        self._network = network
        self._peers = peers
        self._disk = disk
        self._clock = clock
        self.master: subprocess.Popen[Any] | None = None
        self.chat: int | None = None
        self._clauses: dict[Fault, str] = {}
        self._hogs: dict[Fault, subprocess.Popen[Any]] = {}
        self._lock = threading.Lock()

    def begin(self, fault: Fault) -> None:
        """Have it happen."""
        peer = self._peers[fault.peer - 1]
        match fault.kind:
            case "kill":
                peer.kill()
            case "kill master":
                if self.chat is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.chat, signal.SIGKILL)
            case "freeze":
                peer.signal(signal.SIGSTOP)
            case "freeze all":
                self._signal_everyone(signal.SIGSTOP)
            case "restarts":
                for _ in range(3):
                    peer.kill()
                    peer.start()
                    time.sleep(fault.lasts_s / 6)
            case "out of memory":
                self._exhaust(fault, peer)
            case "no memory":
                self._limit(peer, _LEFT_BYTES)
            case "bit flip" | "truncate":
                self._damage(fault, peer)
            case "disk full" | "master disk full":
                with contextlib.suppress(OSError), open(self._ballast(fault), "wb") as file:
                    while True:
                        file.write(bytes(1 << 20))
                        file.flush()
            case "clock" | "master clock":
                jump_s = _JUMPS_S[int(fault.after_s * 1e6) % len(_JUMPS_S)]
                set_offset(self._wrong_clock(fault), jump_s)
            case _:
                self._link(fault, LINKS[fault.kind])

    def end(self, fault: Fault) -> None:
        """Mend it."""
        peer = self._peers[fault.peer - 1]
        match fault.kind:
            case "kill" | "restarts":
                peer.start()
            case "freeze":
                peer.signal(signal.SIGCONT)
            case "freeze all":
                self._signal_everyone(signal.SIGCONT)
            case "out of memory":
                self._give_back(fault, peer)
                peer.start()
            case "no memory":
                self._limit(peer, None)
                peer.start()
            case "disk full" | "master disk full":
                self._ballast(fault).unlink(missing_ok=True)
            case "clock" | "master clock":
                set_offset(self._wrong_clock(fault), 0.0)
            case "bit flip" | "truncate" | "kill master":
                pass
            case _:
                self._link(fault, "")

    def _signal_everyone(self, number: signal.Signals) -> None:
        for peer in self._peers:
            peer.signal(number)
        if self.master is not None and self.master.poll() is None:
            os.killpg(self.master.pid, number)

    def _wrong_clock(self, fault: Fault) -> Path:
        return self._clock if fault.kind == "master clock" else self._peers[fault.peer - 1].clock

    def _ballast(self, fault: Fault) -> Path:
        disk = self._disk if fault.kind == "master disk full" else self._peers[fault.peer - 1].disk
        return disk / "ballast"

    def _exhaust(self, fault: Fault, peer: Peer) -> None:
        """Have the system end it, as the one of its group that may be ended."""
        folder = peer.memory.folder
        if folder is None or not (folder / "memory.limit_in_bytes").exists():
            peer.kill()
            return
        used = int((folder / "memory.usage_in_bytes").read_text())
        (folder / "memory.limit_in_bytes").write_text(str(used + _LEFT_BYTES))
        hog = [sys.executable, "-c", _HOG, str(folder / "cgroup.procs")]
        self._hogs[fault] = subprocess.Popen(hog)

    def _give_back(self, fault: Fault, peer: Peer) -> None:
        if (hog := self._hogs.pop(fault, None)) is not None:
            assert peer.memory.folder is not None
            (peer.memory.folder / "memory.limit_in_bytes").write_text("-1")
            hog.kill()
            hog.wait()

    def _limit(self, peer: Peer, left: int | None) -> None:
        """Have allocations fail that need more than is ``left``."""
        assert peer.process is not None
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            most = resource.RLIM_INFINITY
            if left is not None:
                most = psutil.Process(peer.process.pid).memory_info().vms + left
            resource.prlimit(peer.process.pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    def _damage(self, fault: Fault, peer: Peer) -> None:
        files = peer.files()
        if not files:
            return
        path = files[int(fault.after_s * 1e6) % len(files)]
        with contextlib.suppress(OSError):
            path.chmod(0o600)
            with open(path, "r+b") as file:
                size = os.fstat(file.fileno()).st_size
                if fault.kind == "truncate":
                    file.truncate(size // 2)
                else:
                    file.seek(size - 1 - size // 3)
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 4]))

    def _link(self, fault: Fault, clause: str) -> None:
        other = fault.peer % PEERS + 1
        with self._lock:
            if clause:
                self._clauses[fault] = clause.format(peer=fault.peer, other=other)
            else:
                self._clauses.pop(fault, None)
            text = ";".join([BASE, *self._clauses.values()])
            self._network.backend.change(parse_topology(text, PEERS + 1))


def secured(identity: Path) -> dict[str, str]:
    """The environment of a device with a certificate."""
    return {**os.environ, INSECURE: "", "TPIRT_IDENTITY": str(identity)}


@functools.cache
def _has_time_namespaces() -> bool:
    with contextlib.suppress(OSError):
        return not subprocess.run(["unshare", "--time", "true"], capture_output=True).returncode
    return False


def _elsewhen(seconds: float) -> list[str]:
    """What a command begins with so that its monotonic clocks are ahead, where that can be."""
    ahead = f"{seconds:.0f}"
    command = ["unshare", "--time", "--monotonic", ahead, "--boottime", ahead]
    return command if _has_time_namespaces() else []


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few MiB; an ordinary folder where none may be mounted."""
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "chaos", str(folder)],
        capture_output=True,
    ).returncode
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
