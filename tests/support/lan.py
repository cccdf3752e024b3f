"""Devices on one Ethernet: network namespaces on a bridge, which carries multicast too."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bench.net.namespace import INTERFACE, Namespace, address
from bench.net.spec import NoRightsError
from tpirt.testing.processes import start_python

# A forked process enters the namespace by itself, which takes a tenth of a cold start.
_INSIDE = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None)
assert libc.setns(os.open(sys.argv[1], os.O_RDONLY), 0) == 0
if sys.argv[2]:
    assert libc.unshare(0x0400_0000) == 0  # CLONE_NEWUTS
    socket.sethostname(sys.argv[2])
from tpirt.cli.main import main
del sys.argv[1:3]
main()
"""


class LanDevice:
    """One device: a namespace, and a home of its own for everything that tpirt keeps.

    Attributes:
        host_name: what it is called; by default as this machine.
    """

    def __init__(self, index: int, home: Path, namespace: Namespace):
        self.address = address(index)
        self.home = home
        self.namespace = namespace
        self.host_name = ""
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start ``tpirt`` on the device."""
        env = {**os.environ, "HOME": str(self.home), "TPIRT_INSECURE": ""}
        for name in ("TPIRT_IDENTITY", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
            env.pop(name, None)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process: subprocess.Popen[str] = start_python(
            *("-c", _INSIDE, self.namespace.path, self.host_name, *arguments),
            **{**pipes, **options},
            env=env,
            text=True,
        )
        self._processes.append(process)
        return process

    def run(self, *arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        """Run ``tpirt`` to its end; returns the exit code and what it printed."""
        given = {} if stdin is None else {"stdin": subprocess.PIPE}
        process = self.start(*arguments, **given)
        out, err = process.communicate(stdin, timeout=150)
        return process.returncode, out, err

    def good(self, *arguments: str, stdin: str | None = None) -> str:
        """As :meth:`run`; it has to succeed."""
        code, out, err = self.run(*arguments, stdin=stdin)
        assert code == 0, err
        return out

    def serve(self, *options: str) -> subprocess.Popen[str]:
        """Start ``tpirt peer`` on the device; it listens."""
        peer = self.start("peer", *options)
        assert peer.stdout is not None
        line = peer.stdout.readline()
        assert line.startswith("listening on"), (line, peer.communicate()[1])
        return peer

    def join(self, master: LanDevice, *options: str) -> str:
        """Have the device join the cluster of ``master`` and serve; returns the code."""
        invitation = master.start("cluster", "invite")
        assert invitation.stdout is not None
        where = next(
            found[1] for line in invitation.stdout if (found := re.search(r"--join (\S+)", line))
        )
        self.serve(*options, "--join", where)
        assert "has joined" in invitation.communicate(timeout=60)[0]
        return where.rpartition("/")[2]

    def ip(self, *arguments: str) -> None:
        """Run ``ip`` on the device."""
        subprocess.run(["ip", *arguments], check=True, preexec_fn=self.namespace.enter)

    def stop(self) -> None:
        """Kill what runs there."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.communicate()
        self._processes.clear()


@contextmanager
def lan(devices: int, folder: Path) -> Iterator[list[LanDevice]]:
    """Make devices on one Ethernet; without the rights for it, skip the test."""
    if shutil.which("ip") is None:
        pytest.skip("`ip` (iproute2) is not installed")
    with ExitStack() as stack:
        try:
            switch, *namespaces = (Namespace() for _ in range(devices + 1))
        except NoRightsError as exc:
            pytest.skip(str(exc))
        for namespace in (switch, *namespaces):
            stack.callback(namespace.close)
        _join(switch, namespaces)
        made = [
            LanDevice(index, folder / f"device{index}", namespace)
            for index, namespace in enumerate(namespaces)
        ]
        for device in made:
            device.home.mkdir()
            stack.callback(device.stop)
        yield made


def _join(switch: Namespace, namespaces: list[Namespace]) -> None:
    commands = ["ip link add name switch type bridge", "ip link set dev switch up"]
    for index, namespace in enumerate(namespaces):
        end = f"name {INTERFACE} netns {namespace.path}"
        commands.append(f"ip link add name d{index} type veth peer {end}")
        commands.append(f"ip link set dev d{index} master switch up")
    _run(switch, commands)
    for index, namespace in enumerate(namespaces):
        # Without the seconds in which an IPv6 address is checked for a duplicate.
        namespace.run(lambda: _write(f"/proc/sys/net/ipv6/conf/{INTERFACE}/accept_dad", "0"))
        _run(
            namespace,
            [
                f"ip address add {address(index)}/24 dev {INTERFACE}",
                f"ip link set dev {INTERFACE} up",
            ],
        )


def _write(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="ascii")


def _run(namespace: Namespace, commands: list[str]) -> None:
    for command in commands:
        done = subprocess.run(
            command.split(), capture_output=True, text=True, preexec_fn=namespace.enter
        )
        if done.returncode:
            pytest.skip(f"`{command}`: {done.stderr.strip()}")
