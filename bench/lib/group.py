"""A group under measurement: a master and its peers, each a process in a place of its own.

A place is a device of an emulated network (:class:`bench.net.network.Device`), or this machine
itself, inside a memory cgroup or not (:class:`LocalPlace`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from bench.lib.cgroup import NO_CGROUP, MemoryCgroup, memory_cgroup
from bench.lib.command import tell
from tpirt.errors import ConfigError

_END_S = 30.0  # for processes to end by themselves
_GIVE_UP_S = 2.0  # the same, after a failure


class GroupError(ConfigError):
    """The master or a peer failed; the message is what it said last."""


class Place(Protocol):
    """Where the process of one rank runs."""

    @property
    def listen(self) -> str:
        """``host:port`` for a peer to listen on; port 0 is any."""

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command in a session of its own; ``options`` are those of ``Popen``."""


@dataclass(frozen=True)
class LocalPlace:
    """This machine, inside ``cgroup``."""

    cgroup: MemoryCgroup = NO_CGROUP
    listen: str = "127.0.0.1:0"

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command; see :class:`Place`."""
        return subprocess.Popen(
            command, preexec_fn=self.cgroup.enter, start_new_session=True, **options
        )


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        tokens: decoded after the first one.
        decode_ms: time of all of these.
        decoded: what each of them waited for: :class:`tpirt.types.TokenTimes`.
        first: each rank's :class:`tpirt.types.RankStats` after the first token.
        ranks: the same after the last.
        collective, comm_dtype: how decoding summed over ranks; ``none`` for one rank.
    """

    ttft_ms: float
    tokens: int
    decode_ms: float
    decoded: list[dict[str, Any]]
    first: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    collective: str
    comm_dtype: str

    @property
    def tpot_ms(self) -> float:
        """Mean time of a token after the first."""
        return self.decode_ms / self.tokens


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        tokens, decode_ms: those after the first, and their time.
        steps: those of decoding.
        same: whether the ids are those of the first answer to this prompt, as far as both go.
        drafts_before, drafts: :class:`tpirt.engine.drafts.controller.DraftStats` before and after
            it; empty without drafts.
    """

    ttft_ms: float
    tokens: int
    decode_ms: float
    steps: int
    same: bool
    drafts_before: dict[str, Any]
    drafts: dict[str, Any]


class Group:
    """A master in the first place, peers in the others; a context manager that ends them."""

    def __init__(
        self,
        places: Sequence[Place],
        peer_options: Sequence[str] = (),
        stderr: Path | None = None,
    ):
        """Start the processes.

        Args:
            places: rank 0's first.
            peer_options: of ``tpirt peer``, without its address.
            stderr: file for what they say there; the caller's own stderr when absent.

        Raises:
            GroupError: a peer ended at its start; says why.
        """
        self._log = stderr
        self._stderr = stderr.open("w") if stderr else None
        self._processes: list[subprocess.Popen[str]] = []
        self.addresses: list[str] = []
        try:
            self._start(places[0], ["bench.lib.master"])
            for place in places[1:]:
                command = ["tpirt", "peer", "--until-stdin-closes", "--quiet", "--no-announce"]
                self._start(place, [*command, "--listen", place.listen, *peer_options])
            for process in self._processes[1:]:
                words = _stream(process.stdout).readline().split()
                if len(words) < 3:
                    raise self._ended("a peer")
                self.addresses.append(words[2])
        except BaseException:
            self.close(_GIVE_UP_S)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close(_END_S if kind is None else _GIVE_UP_S)

    def connect(self, peers: Sequence[str] | None = None, **options: Any) -> Mapping[str, int]:
        """Connect the master, again if it was; returns ``layers``, ``hidden_size`` and so on.

        Args:
            peers: where the master reaches them; where they listen, when absent.
            options: other keyword arguments of ``Engine.connect``.

        Raises:
            GroupError: it could not; says why.
        """
        reached = self.addresses if peers is None else peers
        return self._ask({"connect": {"peers": reached, **options}})

    def generate(
        self, prompt_tokens: int, tokens: int, between: Callable[[], None] = lambda: None
    ) -> Request:
        """Generate ``tokens`` after the first; ``between`` is called when the first is there.

        Raises:
            GroupError: the master or a peer failed; says why.
        """
        first = self._ask({"prompt_tokens": prompt_tokens, "tokens": tokens})
        between()
        rest = self._ask({})
        if not rest["decoded"]:
            raise GroupError("the model ends its answer at its first token: use another model")
        return Request(**first, **rest)

    def answer(self, prompt: int | Sequence[Mapping[str, str]], tokens: int) -> Answer:
        """Answer a prompt of so many tokens, or messages, with up to ``tokens`` tokens.

        Raises:
            GroupError: the master or a peer failed; says why.
        """
        return Answer(**self._ask({"ask": {"prompt": prompt, "tokens": tokens}}))

    def close(self, patience_s: float) -> None:
        """End all processes, the master first; kill those that outlast ``patience_s``."""
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            with suppress(BrokenPipeError):
                _stream(process.stdin).close()
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except BaseException as exc:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(exc, subprocess.TimeoutExpired):
                    raise
            _stream(process.stdout).close()
        self._processes.clear()
        if self._stderr is not None:
            self._stderr.close()

    def _start(self, place: Place, module: Sequence[str]) -> None:
        process = place.popen(
            [sys.executable, "-m", *module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self._processes.append(process)

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        master = self._processes[0]
        with suppress(BrokenPipeError):
            _stream(master.stdin).write(json.dumps(order) + "\n")
            _stream(master.stdin).flush()
        line = _stream(master.stdout).readline()
        if not line:
            raise self._ended("the master")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise GroupError(answer["error"])
        return answer

    def _ended(self, name: str) -> GroupError:
        if self._log is None:
            return GroupError(f"{name} ended; its last words are above")
        lines = self._log.read_text().strip().splitlines() or ["it left no message"]
        return GroupError(f"{name} ended: {lines[-1]}")


@dataclass(frozen=True)
class LimitedRun:
    """One request of a group made for it, and each rank's figures of its cgroup."""

    request: Request
    peak_bytes: list[int | None]
    cache_bytes: list[int | None]


def run_limited(
    world_size: int,
    limit_bytes: int | None,
    peer_options: Sequence[str],
    engine: Mapping[str, Any],
    *,
    prompt_tokens: int,
    tokens: int,
) -> LimitedRun:
    """Run one request over new processes on this machine.

    Args:
        world_size: ranks, one process each.
        limit_bytes: memory of each, held to by tpirt itself and by a cgroup; None for no limit.
        peer_options: of ``tpirt peer``, without the limit.
        engine: keyword arguments of ``Engine.connect``, without the limit.
        prompt_tokens: length of the prompt.
        tokens: to decode after the first.

    Raises:
        GroupError: a process failed.
    """
    limit = [] if limit_bytes is None else ["--memory", str(limit_bytes)]
    with ExitStack() as stack:
        cgroups = [
            NO_CGROUP
            if limit_bytes is None
            else stack.enter_context(memory_cgroup(f"rank{rank}", limit_bytes, tell))
            for rank in range(world_size)
        ]
        places = [LocalPlace(cgroup) for cgroup in cgroups]
        group = stack.enter_context(Group(places, [*peer_options, *limit]))
        group.connect(**engine, memory_bytes=limit_bytes)
        request = group.generate(prompt_tokens, tokens)
        return LimitedRun(
            request,
            [cgroup.peak_bytes() for cgroup in cgroups],
            [cgroup.cache_bytes() for cgroup in cgroups],
        )


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
