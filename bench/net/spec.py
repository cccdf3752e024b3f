"""What links there are between devices, and how people write it down.

    1ms/300mbit                          every device's link
    5ms±1ms/320mbit/loss0.1%             with jitter (``+-`` will do) and lost packets
    1ms/flip1%  1ms/replay1%             packets with a flipped bit, or an earlier one's bytes
    0:5ms/510mbit;1:7ms/320mbit          device by device
    2:up=8ms/20mbit,down=2ms/100mbit     each direction by itself
    0-1:2ms/100mbit  0>1:2ms  1-2:none   a link of their own for two devices, one way, no way

A later clause overrides an earlier one. A device's link leads to the router; a plain value is
that of a message from this device to another one with the same link: half of its latency, jitter
and loss happens on the way up to the router and half on the way down. ``up=`` and ``down=`` give
the value of that way alone. The rate is that of each way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tpirt.errors import ConfigError

MAX_DEVICES = 64
_EXAMPLE = "such as 1ms/300mbit or 5ms+-1ms/320mbit/loss0.1%"
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_LATENCY = re.compile(rf"{_NUMBER}(us|ms|s)(?:(?:±|\+-){_NUMBER}(us|ms|s))?")
_RATE = re.compile(rf"{_NUMBER}(k|m|g)bit")
_SHARE = re.compile(rf"(loss|flip|replay){_NUMBER}%")
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_MBIT = {"k": 1e-3, "m": 1.0, "g": 1e3}


class LinkError(ConfigError):
    """A link that makes no sense, cannot be built here, or is not what was asked for."""


class NoRightsError(LinkError):
    """This user, or this system, makes no network namespaces or devices."""


@dataclass(frozen=True)
class Link:
    """One direction of a link; ``rate_mbit`` None is no bound, jitter is uniform in +-.

    Flipped and replayed bytes are such as TCP's checksum does not find.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    rate_mbit: float | None = None
    loss_percent: float = 0.0
    reorder: bool = False
    flip_percent: float = 0.0
    replay_percent: float = 0.0

    def __str__(self) -> str:
        jitter = f"±{self.jitter_ms:.6g}ms" if self.jitter_ms else ""
        rate = f"/{self.rate_mbit:.6g}mbit" if self.rate_mbit is not None else ""
        shares = "".join(
            f"/{name}{percent:.6g}%"
            for name in ("loss", "flip", "replay")
            if (percent := getattr(self, f"{name}_percent"))
        )
        return f"{self.latency_ms:.6g}ms{jitter}{rate}{shares}" + "/reorder" * self.reorder

    def halved(self) -> Link:
        """One way of two that together delay and lose as this one does."""

        def half(percent: float) -> float:
            return (1 - (1 - percent / 100) ** 0.5) * 100

        return replace(
            self,
            latency_ms=self.latency_ms / 2,
            jitter_ms=self.jitter_ms / 2,
            loss_percent=half(self.loss_percent),
            flip_percent=half(self.flip_percent),
            replay_percent=half(self.replay_percent),
        )


@dataclass(frozen=True)
class Topology:
    """Links of devices 0 to N - 1.

    ``up[i]`` and ``down[i]`` join device i and the router. A pair in ``pairs`` has a link of its
    own that passes the router by; None there is no way at all.
    """

    up: tuple[Link | None, ...]
    down: tuple[Link | None, ...]
    pairs: dict[tuple[int, int], Link | None]

    @property
    def devices(self) -> int:
        """How many devices."""
        return len(self.up)

    def path(self, source: int, target: int) -> tuple[Link, ...]:
        """The links that a packet crosses one after another; empty where there is no way."""
        if (source, target) in self.pairs:
            link = self.pairs[source, target]
            return () if link is None else (link,)
        up, down = self.up[source], self.down[target]
        return () if up is None or down is None else (up, down)

    def routes(self) -> Iterator[tuple[int, int]]:
        """All pairs of devices between which there is a way, in order."""
        for source in range(self.devices):
            for target in range(self.devices):
                if source != target and self.path(source, target):
                    yield source, target

    def latency_ms(self, source: int, target: int) -> float:
        """One-way latency of a pair that has a way, without serialization."""
        return sum(link.latency_ms for link in self.path(source, target))

    def jitter_ms(self, source: int, target: int) -> float:
        """Most by which the latency of a pair varies."""
        return sum(link.jitter_ms for link in self.path(source, target))

    def rate_mbit(self, source: int, target: int) -> float | None:
        """Rate of the slowest link on the way; None is no bound."""
        rates = (link.rate_mbit for link in self.path(source, target))
        return min((rate for rate in rates if rate is not None), default=None)

    def all_links(self) -> list[Link]:
        """Every link, in no particular order."""
        links = (*self.up, *self.down, *self.pairs.values())
        return [link for link in links if link is not None]


def uniform(link: Link, devices: int) -> Topology:
    """The topology in which every device has the same link."""
    return Topology((link.halved(),) * devices, (link.halved(),) * devices, {})


def parse_topology(text: str, devices: int) -> Topology:
    """Read a specification; see the module's head.

    Raises:
        LinkError: it makes no sense, names a device that is not there, or leaves one out.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise LinkError(f"{devices} devices: expected 1 to {MAX_DEVICES}")
    up: list[Link | None] = [None] * devices
    down: list[Link | None] = [None] * devices
    pairs: dict[tuple[int, int], Link | None] = {}
    for clause in text.split(";"):
        where, colon, value = clause.strip().rpartition(":")
        if not colon:
            ways = _parse_ways(value, clause)
            up, down = [ways[0]] * devices, [ways[1]] * devices
        elif match := re.fullmatch(r"(\d+)\s*([->])\s*(\d+)", where.strip()):
            first, second = (_device(match[i], devices, clause) for i in (1, 3))
            if first == second:
                raise LinkError(f"link {clause.strip()!r}: a device has no link to itself")
            link = None if value.strip() == "none" else parse_link(value)
            pairs[first, second] = link
            if match[2] == "-":
                pairs[second, first] = link
        else:
            device = _device(where.strip(), devices, clause)
            up[device], down[device] = _parse_ways(value, clause)
    topology = Topology(tuple(up), tuple(down), pairs)
    _check_joined(topology)
    return topology


def parse_link(text: str) -> Link:
    """Read one value such as ``5ms±1ms/320mbit/loss0.1%``; parts in any order, each once.

    Raises:
        LinkError: it makes no sense.
    """
    found: dict[str, float] = {}
    for part in text.strip().split("/"):
        values = _parse_part(part.strip().lower(), text)
        if twice := found.keys() & values.keys():
            name = min(twice, key=list(values).index).partition("_")[0]
            raise LinkError(f"link {text.strip()!r}: {name} is given twice")
        found.update(values)
    reorder = bool(found.pop("reorder", False))
    link = Link(**found, reorder=reorder)
    if link.jitter_ms > link.latency_ms:
        raise LinkError(
            f"link {text.strip()!r}: the jitter of {link.jitter_ms:g} ms is more than the latency "
            f"of {link.latency_ms:g} ms, and no message arrives before it is sent"
        )
    return link


def _parse_part(part: str, text: str) -> dict[str, float]:
    if match := _LATENCY.fullmatch(part):
        jitter = float(match[3]) * _MS[match[4]] if match[3] else 0.0
        return _bounded(text, latency_ms=float(match[1]) * _MS[match[2]], jitter_ms=jitter)
    if match := _RATE.fullmatch(part):
        return _bounded(text, rate_mbit=float(match[1]) * _MBIT[match[2]])
    if match := _SHARE.fullmatch(part):
        return _bounded(text, **{f"{match[1]}_percent": float(match[2])})
    if part == "reorder":
        return {"reorder": 1.0}
    raise LinkError(
        f"link {text.strip()!r}: {part!r} is no latency, rate, loss, flip, replay or reorder; "
        f"{_EXAMPLE}"
    )


_BOUNDS = {
    "latency_ms": (0.0, 60_000.0, "ms"),
    "jitter_ms": (0.0, 60_000.0, "ms"),
    "rate_mbit": (0.01, 100_000.0, "Mbit/s"),
    "loss_percent": (0.0, 50.0, "%"),
    "flip_percent": (0.0, 100.0, "%"),
    "replay_percent": (0.0, 100.0, "%"),
}


def _bounded(text: str, **values: float) -> dict[str, float]:
    for name, value in values.items():
        low, high, unit = _BOUNDS[name]
        if not low <= value <= high:
            raise LinkError(
                f"link {text.strip()!r}: {name.partition('_')[0]} {value:g} {unit}: expected "
                f"{low:g} to {high:g} {unit}"
            )
    return values


def _parse_ways(text: str, clause: str) -> tuple[Link, Link]:
    """Read a device's link: one value for both ways, or ``up=...,down=...``."""
    if "=" not in text:
        half = parse_link(text).halved()
        return half, half
    ways: dict[str, Link] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("up", "down") or name in ways:
            raise LinkError(
                f"link {clause.strip()!r}: expected up=... and down=..., each once, got {part!r}"
            )
        ways[name] = parse_link(value)
    if len(ways) < 2:
        missing = "down" if "up" in ways else "up"
        raise LinkError(f"link {clause.strip()!r}: {missing}=... is missing")
    return ways["up"], ways["down"]


def _device(text: str, devices: int, clause: str) -> int:
    if not text.isdecimal() or len(text) > 3 or int(text) >= devices:
        raise LinkError(
            f"link {clause.strip()!r}: {text!r} is no device; there are 0 to {devices - 1}"
        )
    return int(text)


def _check_joined(topology: Topology) -> None:
    for source in range(topology.devices):
        for target in range(topology.devices):
            if source == target or (source, target) in topology.pairs:
                continue
            if topology.up[source] is None or topology.down[target] is None:
                lacking = source if topology.up[source] is None else target
                raise LinkError(
                    f"no link leads from device {source} to {target}: give device {lacking} one "
                    f"({lacking}:1ms/300mbit), or say that there is none ({source}>{target}:none)"
                )
