"""Fuzzed messages at every entry point of a peer, while an honest master asks it for something.

    python -m bench.hostile --messages 100000

A peer with a certificate serves on an address of this machine beyond loopback, so with TLS. One
entry point after the other gets its share of the messages from several attackers at once: those
that nobody knows, a device of the cluster that is no master, and one that has a master's
certificate. Meanwhile an honest master says Hello on new connections. Checked: nobody is served who
may not be, the peer lives, prints no traceback, takes no more memory than is stated, answers the
honest master in time, and has no more descriptors and threads afterwards; then its tokens are
right.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.lib.attackers import (
    CALLS,
    Attack,
    Corpus,
    Tally,
    Target,
    calls_with,
    frames_with,
    http2_with,
    join_listener,
    links_with,
    raw_bytes,
    records_with,
    second_port,
    setups_with,
    without_certificate,
)
from bench.lib.command import end_like_a_command, new_parser, tell
from bench.lib.record import Record, add_json_option
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import ConfigError
from tpirt.identity.certificates import Identity
from tpirt.identity.trust import Trust
from tpirt.testing.identities import MadeCluster
from tpirt.testing.models import make_model
from tpirt.transport.address import Address
from tpirt.transport.base import Channel
from tpirt.transport.frame import Frame
from tpirt.transport.grpc import GrpcPeerClient
from tpirt.transport.tickets import PORT_OFFSET
from tpirt.types import SamplingParams

BOUNDS = {"rss_bytes": 256 << 20, "honest_s": 1.0, "descriptors": 8, "threads": 16}
_PROMPT, _PARAMS = list(range(40, 64)), SamplingParams(max_tokens=6)
_ATTACKERS = 8
_WAITING = 24  # where most of the time is a wait
_PERIOD_S = 0.2  # between two of the honest master's questions
_SETTLE_S = 30.0  # for what the last callers held to be given back
_START_S = 60.0
_BAD_LINES = ("Traceback", "Fatal", "never retrieved", "Exception in callback", "excepthook")


@dataclass(frozen=True)
class Entry:
    """An entry point: how many of a hundred messages it gets, and how many attackers at once."""

    name: str
    share: int
    attack: Attack
    attackers: int = _ATTACKERS


@dataclass
class Row:
    """What one entry point showed."""

    entry: str
    tally: Tally
    seconds: float = 0.0
    rss_growth: int = 0
    honest: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def entries(peer: Identity, master: Identity) -> list[Entry]:
    """All entry points; the shares follow from what a message takes."""
    return [
        Entry("gRPC port, raw bytes", 10, raw_bytes, attackers=_WAITING),
        Entry("gRPC port, TLS without certificate", 10, without_certificate),
        Entry("second port", 12, second_port, attackers=_WAITING),
        Entry("join listener", 3, join_listener),
        Entry("a peer's certificate: HTTP/2", 5, http2_with(peer), attackers=_WAITING),
        Entry("a peer's certificate: calls", 12, calls_with(peer, *CALLS[:-1], "X", allowed=False)),
        Entry("a peer's certificate: links", 10, links_with(peer)),
        Entry("a master's certificate: Link", 5, calls_with(master, "Link", allowed=False)),
        Entry("a master's: Hello", 7, calls_with(master, "Hello", allowed=True)),
        Entry("a master's: Inventory", 6, calls_with(master, "Inventory", allowed=True)),
        Entry("a master's: Renew", 5, calls_with(master, "Renew", allowed=True)),
        Entry("a master's: PutUnits", 3, calls_with(master, "PutUnits", allowed=True)),
        Entry("a master's: Setup", 4, setups_with(master)),
        Entry("a master's: frames of a session", 4, frames_with(master), attackers=1),
        Entry("a master's: sealed records", 4, records_with(master)),
    ]


# -- who is attacked -----------------------------------------------------------------------------


class Peer:
    """A ``tpirt peer`` beyond loopback."""

    def __init__(self, folder: Path, host: str):
        self.log_path = folder / "peer.log"
        port = _two_free_ports(host)
        self.address = Address(host, port)
        self.second_port = port + PORT_OFFSET
        with open(self.log_path, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tpirt", "peer", "--listen", str(self.address)),
                    *("--threads", "1", "--store", str(folder / "peer-store")),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TPIRT_IDENTITY": str(folder / "peer"), "TPIRT_INSECURE": ""},
            )
        assert self.process.stdout is not None
        if not self.process.stdout.readline().startswith("listening"):
            raise ConfigError(f"the peer does not start: {self.log}")
        self._status = psutil.Process(self.process.pid)

    @property
    def log(self) -> str:
        """What it said."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def rss(self) -> int:
        """Its memory."""
        return int(self._status.memory_info().rss) if self.alive else 0

    def held(self) -> tuple[int, int]:
        """Its descriptors and threads."""
        return self._status.num_fds(), self._status.num_threads()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Invitations:
    """The master's side of joining: an invitation, and the next one when it has ended."""

    def __init__(self, folder: Path, host: str):
        self._env = {**os.environ, "TPIRT_IDENTITY": str(folder), "TPIRT_INSECURE": ""}
        self._host = host
        self._log = folder.parent / "invitations.log"
        self._process: subprocess.Popen[str] | None = None
        self._where: Address | None = None
        self._opening = asyncio.Lock()

    @property
    def log(self) -> str:
        """What they said on standard error."""
        return self._log.read_text(encoding="utf-8") if self._log.exists() else ""

    async def open(self) -> Address:
        """The address of one that is open."""
        async with self._opening:
            if self._where is None or self._process is None or self._process.poll() is not None:
                self.close()
                self._where = await asyncio.to_thread(self._invite)
            return self._where

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def _invite(self) -> Address:
        with open(self._log, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tpirt", "cluster", "invite"),
                    *("--listen", f"{self._host}:0"),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._env,
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"tpirt peer --join (\S+)/\S+", line):
                return Address.parse(found[1])
        raise ConfigError(f"no invitation: {self.log}")


def network_address() -> str:
    """An address of this machine beyond loopback.

    Raises:
        ConfigError: there is none.
    """
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family is socket.AF_INET and not each.address.startswith("127."):
                return str(each.address)
    raise ConfigError("this machine has no IPv4 address beyond loopback; give it one")


def _two_free_ports(host: str) -> int:
    while True:
        with socket.create_server((host, 0)) as first:
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                socket.create_server((host, port + PORT_OFFSET)).close()
                return port


# -- the honest master ---------------------------------------------------------------------------


class Recording(GrpcPeerClient):
    """Keeps what it sends."""

    def __init__(self, address: str, trust: Trust):
        super().__init__(address, trust)
        self.corpus = Corpus()

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """See :class:`tpirt.transport.base.PeerClient`."""
        self.corpus.calls.setdefault(method, []).append(request)
        return await super().call(method, request, timeout_s)

    async def upload(self, method: str, chunks: Any, timeout_s: float) -> bytes:
        """See :class:`tpirt.transport.base.PeerClient`."""

        async def kept() -> Any:
            async for chunk in chunks:
                self.corpus.chunks.append(chunk)
                yield chunk

        return await super().upload(method, kept(), timeout_s)

    async def open_session(self) -> Channel:
        """See :class:`tpirt.transport.base.PeerClient`."""
        channel = await super().open_session()
        send = channel.send

        async def kept(frame: Frame) -> None:
            self.corpus.frames.append(b"".join(map(bytes, frame.parts())))
            await send(frame)

        channel.send = kept  # type: ignore[method-assign]
        return channel


async def answer(model: Path, folder: Path, peers: Sequence[GrpcPeerClient]) -> list[int]:
    """Generate some tokens."""
    options = EngineOptions(
        dtype="float32", threads=1, store=str(folder / "store"), chunk_tokens=8, draft="none"
    )
    async with Engine.connect(model, options, peers=list(peers)) as engine:
        return (await engine.complete(_PROMPT, _PARAMS)).token_ids


class Watch:
    """Notes the honest master's times and the peer's memory for the row at hand."""

    def __init__(self, peer: Peer, identity: Path):
        self._peer = peer
        self.row: Row | None = None
        self.peak = self.base = peer.rss()
        self._ended = threading.Event()
        self._master = subprocess.Popen(
            [sys.executable, "-m", "bench.lib.honest_master", str(peer.address), str(_PERIOD_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TPIRT_IDENTITY": str(identity), "TPIRT_INSECURE": ""},
        )
        self._threads = [threading.Thread(target=each) for each in (self._listen, self._measure)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the honest master."""
        assert self._master.stdin is not None
        self._master.stdin.close()
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._master.wait()
        assert self._master.stdout is not None
        self._master.stdout.close()

    def _listen(self) -> None:
        assert self._master.stdout is not None
        for line in self._master.stdout:
            said, row = json.loads(line), self.row
            if row is not None and "error" in said:
                row.errors.append(said["error"])
            elif row is not None:
                row.honest.append(said["seconds"])

    def _measure(self) -> None:
        while not self._ended.wait(0.02):
            rss = self._peer.rss()
            self.peak = max(self.peak, rss)
            if self.row is not None:
                self.row.rss_growth = max(self.row.rss_growth, rss - self.base)


@contextmanager
def watching(peer: Peer, identity: Path) -> Iterator[Watch]:
    """Watch until the end."""
    watch = Watch(peer, identity)
    try:
        yield watch
    finally:
        watch.close()


# -- the run -------------------------------------------------------------------------------------


async def attacked(
    entry: Entry, target: Target, messages: int, seed: int, until_s: float, watch: Watch
) -> Row:
    """Have one entry point attacked."""
    row = watch.row = Row(entry.name, Tally())
    began_s = time.monotonic()
    share = -(-messages // entry.attackers)
    attackers = [
        entry.attack(target, random.Random(f"{seed} {entry.name} {n}"), share, row.tally)
        for n in range(entry.attackers)
    ]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.1, until_s - began_s)):
            await asyncio.gather(*attackers)
    while not row.honest and not row.errors and time.monotonic() < began_s + _SETTLE_S:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    row.seconds = time.monotonic() - began_s
    watch.row = None
    return row


async def run(messages: int, seed: int, minutes: float, folder: Path) -> dict[str, Any]:
    """Attack every entry point; returns rows, figures and what is wrong."""
    host = network_address()
    cluster = MadeCluster(folder / "master")
    trust = cluster.peer(folder / "peer")
    identity, master = trust.identity, cluster.master.identity
    assert identity is not None
    assert master is not None
    model = make_model(folder / "model")
    expected = await answer(model, folder, [])
    with ExitStack() as stack:
        peer = Peer(folder, host)
        stack.callback(peer.close)
        invitations = Invitations(cluster.folder, host)
        stack.callback(invitations.close)
        first = Recording(str(peer.address), cluster.master)
        wrong = [] if await answer(model, folder, [first]) == expected else ["wrong tokens before"]
        await first.aclose()
        certificate = identity.certificate
        target = Target(peer.address, peer.second_port, certificate, first.corpus, invitations.open)
        before = peer.held()
        watch = stack.enter_context(watching(peer, cluster.folder))
        until_s, rows = time.monotonic() + 60 * minutes, []
        other = cluster.identity(folder / "other.pem", "peer", "other")
        for entry in entries(other, master):
            count = max(1, messages * entry.share // 100)
            rows.append(await attacked(entry, target, count, seed, until_s, watch))
            tell("\n".join(table(rows[-1:])[1:]))
            if not peer.alive:
                break
        if peer.alive:
            after = await settled(peer, before)
            last = GrpcPeerClient(str(peer.address), cluster.master)
            if await answer(model, folder, [last]) != expected:
                wrong.append("wrong tokens afterwards")
            await last.aclose()
        else:
            after = before
            wrong.append(f"the peer ended with {peer.process.returncode}")
        wrong += verdicts(
            rows, {"peer": peer.log, "invitation": invitations.log}, watch.peak - watch.base
        )
        wrong += [
            f"{now - then} more {name} than before"
            for name, then, now in zip(("descriptors", "threads"), before, after, strict=True)
            if now - then > BOUNDS[name]
        ]
        log_bytes = peer.log_path.stat().st_size
    return {
        "rows": rows,
        "wrong": wrong,
        "rss_base": watch.base,
        "rss_growth": watch.peak - watch.base,
        "held_before": before,
        "held_after": after,
        "log_bytes": log_bytes,
    }


async def settled(peer: Peer, before: tuple[int, int]) -> tuple[int, int]:
    """What the peer holds once the callers' connections are gone."""
    until_s = time.monotonic() + _SETTLE_S
    while time.monotonic() < until_s:
        if all(n - b <= BOUNDS[k] for n, b, k in zip(peer.held(), before, _HELD, strict=True)):
            break
        await asyncio.sleep(0.2)
    return peer.held()


_HELD = ("descriptors", "threads")


def verdicts(rows: Sequence[Row], logs: dict[str, str], growth: int) -> list[str]:
    """What must not be."""
    wrong = [f"{row.entry}: {how}: {n}" for row in rows for how, n in row.tally.wrong.items()]
    wrong += [f"{row.entry}: the honest master: {row.errors[0]}" for row in rows if row.errors]
    wrong += [
        f"{row.entry}: the honest master waited {max(row.honest):.2f} s"
        for row in rows
        if row.honest and max(row.honest) > BOUNDS["honest_s"]
    ]
    if growth > BOUNDS["rss_bytes"]:
        wrong.append(f"{growth / 2**20:.0f} MiB more memory")
    return wrong + [
        f"{who}: {each}" for who, log in logs.items() for each in tracebacks(log.splitlines())
    ]


def tracebacks(lines: Sequence[str]) -> list[str]:
    """What a log has that a peer should not print, the first of each kind, with what follows."""
    found = {}
    for number, line in enumerate(lines):
        if any(each in line for each in _BAD_LINES):
            found.setdefault(line[:40], "\n".join(lines[number : number + 20]))
    return list(found.values())


def table(rows: Sequence[Row]) -> list[str]:
    """One line for each entry point."""
    lines = [f"{'entry point':36s} messages      s  honest max s  RSS + MiB  taken"]
    for row in rows:
        taken = ", ".join(f"{n} {how}" for how, n in row.tally.taken.most_common(6))
        longest = max(row.honest, default=float("nan"))
        lines.append(
            f"{row.entry:36s} {row.tally.messages:8d} {row.seconds:6.1f} {longest:13.3f} "
            f"{row.rss_growth / 2**20:10.1f}  {taken}"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    """Parse arguments, attack, print the table."""
    parser = new_parser("bench.hostile", __doc__)
    parser.add_argument("--messages", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="end after that")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    record = Record("hostile", argv, arguments)
    with tempfile.TemporaryDirectory(prefix="tpirt-hostile-") as folder:
        found = asyncio.run(
            run(arguments.messages, arguments.seed, arguments.minutes, Path(folder))
        )
    rows: list[Row] = found.pop("rows")
    print("\n".join(table(rows)))
    honest = sorted(second for row in rows for second in row.honest)
    found["messages"] = sum(row.tally.messages for row in rows)
    print(
        f"{found['messages']} messages; the peer's memory grew from "
        f"{found['rss_base'] / 2**20:.0f} MiB by at most {found['rss_growth'] / 2**20:.1f}; the "
        f"honest master asked {len(honest)} times and waited {honest[len(honest) // 2]:.3f} s "
        f"(median), {honest[-1]:.3f} s (longest)"
    )
    for each in found["wrong"]:
        print(f"WRONG: {each}")
    record.finish({**found, "bounds": BOUNDS, "rows": [_as_json(row) for row in rows]})
    return int(bool(found["wrong"]))


def _as_json(row: Row) -> dict[str, Any]:
    return {
        **{name: value for name, value in vars(row).items() if name not in ("tally", "honest")},
        **vars(row.tally),
        "honest": len(row.honest),
        "honest_max_s": max(row.honest, default=None),
    }


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
