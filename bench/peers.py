"""A whole group for a benchmark: workers and a master on this machine, each in its own cgroup."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from bench.cgroup import MemoryCgroup, memory_cgroup

_END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class GroupRun:
    """One run: the JSON that its master printed, and each rank's cgroup's figures."""

    printed: dict[str, Any]
    peak_bytes: list[int | None]
    cache_bytes: list[int | None]


def tpirt(*arguments: str) -> list[str]:
    """The command line of this tpirt."""
    return [sys.executable, "-m", "tpirt", *arguments]


def warn(text: str) -> None:
    """Tell what is going on, or what the figures lack."""
    print(text, file=sys.stderr, flush=True)


def run_group(
    world_size: int, limit_bytes: int | None, shared: Sequence[str], master: Sequence[str]
) -> GroupRun:
    """Run a master with its workers once; all processes are gone when this returns or raises.

    Args:
        world_size: ranks, this many processes.
        limit_bytes: each one's limit, tpirt's own and its cgroup's; None for neither.
        shared: options of ``tpirt peer`` and the master alike.
        master: its command line; takes the options of ``tpirt generate``, prints JSON.

    Raises:
        SystemExit: a process failed; it has said why on stderr.
    """
    options = [*shared, *(["--memory", str(limit_bytes)] if limit_bytes else [])]
    with ExitStack() as stack:
        groups = [
            stack.enter_context(memory_cgroup(f"rank{rank}", limit_bytes, warn))
            if limit_bytes is not None
            else MemoryCgroup(None)
            for rank in range(world_size)
        ]
        peers = [stack.enter_context(_worker(options, group)) for group in groups[1:]]
        command = [*master, *options]
        if peers:
            command += ["--peers", ",".join(peers)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, preexec_fn=groups[0].enter, start_new_session=True
        )
        if done.returncode:
            raise SystemExit(f"the master ended with exit code {done.returncode}")
        return GroupRun(
            json.loads(done.stdout),
            [group.peak_bytes() for group in groups],
            [group.cache_bytes() for group in groups],
        )


@contextmanager
def _worker(options: Sequence[str], group: MemoryCgroup) -> Iterator[str]:
    """Run a worker inside ``group``; yields its address."""
    command = tpirt("peer", "--listen", "127.0.0.1:0", "--until-stdin-closes", "--quiet", *options)
    pipe = subprocess.PIPE
    # Sessions of their own: Ctrl-C at the terminal reaches the benchmark alone, which ends them.
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        text=True,
        preexec_fn=group.enter,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            words = process.stdout.readline().split()
            if len(words) < 3:
                raise SystemExit(f"a worker ended at its start with exit code {process.wait()}")
            yield words[2]
        finally:
            process.stdin.close()
            try:
                process.wait(_END_TIMEOUT_S)
            except BaseException:  # it hangs, or somebody is impatient
                process.kill()
                raise
