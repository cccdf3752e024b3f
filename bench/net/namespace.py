"""Network namespaces without names: the kernel removes them when their last user is gone.

A namespace is held by a file descriptor of this process and by the processes inside. However the
run ends, also by SIGKILL, nothing is left to be cleaned up, and no other run can be in the way.
``nsenter --net=/proc/PID/fd/FD`` leads a shell into one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bench.net.spec import NoRightsError

_T = TypeVar("_T")

INTERFACE = "link0"
MTU = 1500

# Linux: include/uapi/linux/{sched,sockios,if,if_tun,prctl}.h
_CLONE_NEWNET = 0x4000_0000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFTXQLEN = 0x8914, 0x8916, 0x891C, 0x8943
_IFF_UP_RUNNING = 0x1 | 0x40
_TUNSETIFF, _TUNSETOFFLOAD = 0x4004_54CA, 0x4004_54D0
_IFF_TUN_NO_PI_VNET_HDR = 0x0001 | 0x1000 | 0x4000
_TUN_F_CSUM_TSO4_TSO6 = 0x1 | 0x2 | 0x4
_PR_SET_PDEATHSIG = 1
_QUEUE_PACKETS = 10_000


def address(device: int) -> str:
    """The IPv4 address of a device; the same in every run, for no run sees another's."""
    return f"10.0.0.{device + 1}"


# Looked up before any fork: a child of a process with threads must not wait for the loader's lock.
_LIBC = ctypes.CDLL(None, use_errno=True)
_FUNCTIONS = {name: getattr(_LIBC, name, None) for name in ("unshare", "setns", "prctl")}


class Namespace:
    """A network namespace with an interface or none yet; close it when its users are gone."""

    def __init__(self) -> None:
        """Make one, with its loopback interface up.

        Raises:
            NoRightsError: this system or these rights do not allow it.
        """
        self.fd = _in_thread(self._make)

    @property
    def path(self) -> str:
        """Where ``nsenter --net=`` finds it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def run(self, work: Callable[[], _T]) -> _T:
        """Call ``work`` inside; the sockets it opens stay there."""

        def inside() -> _T:
            self.enter()
            return work()

        return _in_thread(inside)

    def enter(self) -> None:
        """Put the calling thread inside for good: for ``preexec_fn``."""
        _call("setns", self.fd, _CLONE_NEWNET)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)

    @staticmethod
    def _make() -> int:
        try:
            _call("unshare", _CLONE_NEWNET)
        except OSError as exc:
            raise NoRightsError(f"no network namespace could be made: {exc.strerror}") from exc
        _set_up("lo")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Tunnel:
    """A device's network interface whose other end is a file descriptor of this process.

    Each read is one IPv4 packet behind a ``virtio_net_hdr`` of 10 bytes. With ``offload`` a TCP
    packet may be up to 64 KiB long, not yet cut into what crosses a wire and without a checksum:
    a message of 32 KiB is then one read and one write rather than 23.
    """

    def __init__(self, namespace: Namespace, device: int):
        """Make it and give it its address.

        Raises:
            NoRightsError: this system or these rights do not allow it.
        """
        self.fd = namespace.run(lambda: _make_tunnel(device))
        self.offload(True)

    def offload(self, on: bool) -> None:
        """Have whole TCP segments sent through, or packets as on a wire."""
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, _TUN_F_CSUM_TSO4_TSO6 if on else 0)

    def close(self) -> None:
        """Remove the interface."""
        os.close(self.fd)


def end_with_parent() -> None:
    """Have the calling process killed when its parent dies: for ``preexec_fn``."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)


def traffic() -> tuple[int, int]:
    """Bytes that the calling thread's device has sent and received so far."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            fields = counters.split()
            return int(fields[8]), int(fields[0])
    return 0, 0


def _make_tunnel(device: int) -> int:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise NoRightsError(f"/dev/net/tun cannot be opened: {exc.strerror}") from exc
    try:
        request = struct.pack("16sH22x", INTERFACE.encode(), _IFF_TUN_NO_PI_VNET_HDR)
        fcntl.ioctl(fd, _TUNSETIFF, request)
        _set_address(device)
    except OSError as exc:
        os.close(fd)
        raise NoRightsError(f"no TUN device could be made: {exc.strerror}") from exc
    return fd


def _set_address(device: int) -> None:
    name = INTERFACE.encode()
    # Nothing but what devices say to each other: the kernel would send IPv6 announcements.
    Path(f"/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6").write_text("1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for code, value in ((_SIOCSIFADDR, address(device)), (_SIOCSIFNETMASK, "255.255.255.0")):
            packed = struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, code, packed)
        fcntl.ioctl(control, _SIOCSIFTXQLEN, struct.pack("16si20x", name, _QUEUE_PACKETS))
    _set_up(INTERFACE)


def _set_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(
            control, _SIOCSIFFLAGS, struct.pack("16sH22x", interface.encode(), _IFF_UP_RUNNING)
        )


def _call(name: str, *arguments: int) -> None:
    function = _FUNCTIONS[name]
    if function is None or function(*arguments):
        code = errno.ENOSYS if function is None else ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _in_thread(work: Callable[[], _T]) -> _T:
    """Call ``work`` in a thread of its own: a thread that has changed namespace must not return."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
