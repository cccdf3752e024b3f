"""Links as the kernel makes them: ``tc netem`` on veth pairs around a bridge.

Not every kernel has it. It does less than our own forwarder: no links of pairs, and a message of
several packets is measured by packets of wire size, each a little work.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import closing

from bench.net.namespace import INTERFACE, Namespace, address
from bench.net.spec import Link, LinkError, Topology

_QUEUE_PACKETS = 1000


class NetemBackend:
    """One veth pair for each device, its other end on a bridge in a namespace of the router's."""

    name = "tc netem"

    def __init__(self, namespaces: list[Namespace]):
        """Join the namespaces, without any delay yet; see :meth:`change`.

        Raises:
            LinkError: the tools or the kernel's part are missing.
        """
        check_netem()
        self._namespaces = namespaces
        self._router = Namespace()
        try:
            self._join()
        except BaseException:
            self._router.close()
            raise

    def change(self, topology: Topology) -> None:
        """Have these links from now on.

        Raises:
            LinkError: netem cannot make them.
        """
        check_supported(topology)
        for device, namespace in enumerate(self._namespaces):
            up, down = topology.up[device], topology.down[device]
            assert up is not None
            assert down is not None
            _run(namespace, f"tc qdisc replace dev {INTERFACE} root {netem(up)}")
            _run(self._router, f"tc qdisc replace dev d{device} root {netem(down)}")

    def close(self) -> None:
        """Remove the router."""
        self._router.close()

    def _join(self) -> None:
        _run(self._router, "ip link add name router type bridge")
        _run(self._router, "ip link set dev router up")
        for device, namespace in enumerate(self._namespaces):
            near, far = f"d{device}", INTERFACE
            _run(
                self._router,
                f"ip link add name {near} type veth peer name {far} netns {namespace.path}",
            )
            # One packet at a time, or netem would take 64 KiB for one packet on each way.
            _run(self._router, f"ip link set dev {near} gso_max_segs 1 master router up")
            _run(namespace, f"ip address add {address(device)}/24 dev {far}")
            _run(namespace, f"ip link set dev {far} gso_max_segs 1 up")


def netem(link: Link) -> str:
    """The arguments of ``tc qdisc`` that stand for a link."""
    words = ["netem limit", str(_QUEUE_PACKETS)]
    if link.latency_ms:
        words.append(f"delay {link.latency_ms * 1e3:.0f}us")
        if link.jitter_ms:
            words.append(f"{link.jitter_ms * 1e3:.0f}us")
    if link.loss_percent:
        words.append(f"loss {link.loss_percent:g}%")
    if link.rate_mbit is not None:
        words.append(f"rate {link.rate_mbit * 1e3:.0f}kbit")
    return " ".join(words)


def check_supported(topology: Topology) -> None:
    """Refuse what netem cannot do.

    Raises:
        LinkError: says what.
    """
    if topology.pairs:
        raise LinkError("tc netem has no link for a pair of devices")
    for link in topology.all_links():
        if link.flip_percent or link.replay_percent:
            raise LinkError("tc netem replays nothing, and TCP finds the bits that it flips")
        if link.reorder or (link.jitter_ms and link.rate_mbit is None):
            raise LinkError(
                "tc netem keeps the order of packets with a rate, and does not keep it with "
                f"jitter and no rate; {link} asks for something else"
            )


def check_netem() -> None:
    """Find out whether tools and kernel have netem.

    Raises:
        LinkError: says what is missing.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise LinkError(f"tc netem: `{tool}` is not installed (iproute2)")
    with closing(Namespace()) as scratch:
        _run(scratch, "tc qdisc add dev lo root netem delay 1ms")


def _run(namespace: Namespace, command: str) -> None:
    done = subprocess.run(
        command.split(), capture_output=True, text=True, preexec_fn=namespace.enter
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LinkError(f"tc netem: `{command}`: {reason}")
