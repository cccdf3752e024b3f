"""A worker that dies or hangs and does not come back: requests fail soon and name it.

What happens if it comes back is in test_reconnect.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.nightly import nightly
from tests.support.plans import allow_one_plan
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import PeerLostError
from tpirt.protocol.messages import UnitChunk
from tpirt.testing.processes import (
    PeerProcess,
    descendants,
    killed_at_exit,
    run_python,
    start_cli,
    survivors,
    wait_for,
)
from tpirt.transport import grpc as transport
from tpirt.transport.base import Channel
from tpirt.transport.grpc import GrpcPeerClient
from tpirt.types import Progress, SamplingParams, ignore_progress

Peers = Callable[[int], list[PeerProcess]]

LONG = SamplingParams(max_tokens=400)
# Measured on loopback: dead 0.02 s, hung the timeout and at most a heartbeat's interval more. The
# rest is for machines that do other things too.
DEAD_S, HUNG_S = 5.0, 5.0


@pytest.fixture(autouse=True)
def two_ranks_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """These peers do not come back, and the others cannot do without."""
    monkeypatch.setattr(transport, "_PATIENCE_S", 0.1)
    allow_one_plan(monkeypatch)


def kill(peer: PeerProcess, _: Engine) -> None:
    peer.signal(signal.SIGKILL)


async def lose(engine: Engine, prompt: list[int], at: Callable[[Engine], None]) -> float:
    """Run a request in which a peer is lost; returns the seconds until it failed."""
    lost: list[float] = []

    def once() -> None:
        if not lost:
            at(engine)
            lost.append(time.monotonic())

    def on_prefill(progress: Progress) -> None:
        if progress.done >= 64 and len(prompt) > 64:
            once()

    async def request() -> None:
        tokens = 0
        async for _ in engine.generate(prompt, LONG, on_prefill):
            tokens += 1
            if tokens == 5:
                once()

    with pytest.raises(PeerLostError) as caught:
        await request()
    seconds = time.monotonic() - lost[0]
    assert caught.value.exit_code == 3
    assert engine.broken is caught.value
    # All further requests look for it, and say the same.
    for _ in range(2):
        with pytest.raises(PeerLostError) as again:
            await engine.complete([1, 2], SamplingParams(max_tokens=2))
        assert again.value.exit_code == 3
        assert without_reason(again.value) == without_reason(caught.value)
        assert engine.broken is again.value
    return seconds


def without_reason(error: PeerLostError) -> tuple[str, str]:
    """How the peer was lost, and whom no connection was made to.

    Why it was not can change: a process that dies hangs up at first, then nothing listens there.
    """
    lost, _, failed = str(error).partition("; reconnecting failed: ")
    assert failed.startswith("peer ")
    assert failed.endswith("without it: too little memory")
    return lost, failed.partition(": ")[0]


async def test_killed_worker_is_named_in_prefill_in_decode_and_between_requests(
    model: Path, peers: Peers, tmp_path: Path
) -> None:
    other, *victims = peers(4)
    asked = [([7] * 300, False), ([1, 2, 3], False), ([1, 2, 3], True)]
    for victim, (prompt, between) in zip(victims, asked, strict=True):
        async with Engine.connect(
            model,
            EngineOptions(threads=1, chunk_tokens=16, store=tmp_path / "store"),
            peers=[other.address, victim.address],
        ) as engine:
            if between:
                await engine.complete([5, 6], SamplingParams(max_tokens=2))
                victim.signal(signal.SIGKILL)
                begun = time.monotonic()
                with pytest.raises(PeerLostError, match=victim.peer_port):
                    await engine.complete([5, 6], SamplingParams(max_tokens=2))
                seconds = time.monotonic() - begun
            else:
                seconds = await lose(engine, prompt, partial(kill, victim))
            assert seconds < DEAD_S
            assert victim.peer_port in str(engine.broken)
            assert other.peer_port not in str(engine.broken)
        # The one that is left is free for the next master at once.
        wait_for(lambda: other.log.rstrip().endswith("waiting for a master"), "free again")
    assert "Traceback" not in other.log


async def test_silence_of_a_worker_that_hangs_is_noticed(
    model: Path, peers: Peers, tmp_path: Path
) -> None:
    (peer,) = peers(1)
    async with Engine.connect(
        model,
        EngineOptions(threads=1, store=tmp_path / "store", timeout_s=1.0),
        peers=[peer.address],
    ) as engine:
        seconds = await lose(engine, [1, 2, 3], lambda _: peer.signal(signal.SIGSTOP))
        assert 0.7 < seconds < HUNG_S
        assert peer.peer_port in str(engine.broken)
        assert "hangs" in str(engine.broken)
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 2


class KilledAtSession(GrpcPeerClient):
    """Stops the worker before its session begins, so that it cannot load, then kills it."""

    def __init__(self, peer: PeerProcess):
        super().__init__(peer.address)
        self._peer = peer

    async def open_session(self) -> Channel:  # type: ignore[override]
        self._peer.signal(signal.SIGSTOP)
        channel = await super().open_session()
        asyncio.get_running_loop().call_later(0.3, self._peer.signal, signal.SIGKILL)
        return channel


async def test_worker_killed_while_it_loads(model: Path, peers: Peers, tmp_path: Path) -> None:
    (peer,) = peers(1)
    begun = time.monotonic()
    with pytest.raises(PeerLostError, match=peer.peer_port):
        async with Engine.connect(
            model, EngineOptions(threads=1, store=tmp_path / "store"), peers=[KilledAtSession(peer)]
        ):
            pytest.fail("loaded")
    assert time.monotonic() - begun < DEAD_S


def whole_slices(store: Path) -> list[Path]:
    return [path.parent for path in store.glob("[!.]*/manifest.json")]


async def test_worker_killed_while_its_slice_comes_has_none_and_gets_it_anew(
    model: Path, tmp_path: Path
) -> None:
    with PeerProcess(tmp_path / "peer") as peer:

        def on_progress(progress: Progress) -> None:
            if progress.stage == "sending slice":
                peer.signal(signal.SIGKILL)

        begun = time.monotonic()
        with pytest.raises(PeerLostError, match=peer.peer_port):
            async with Engine.connect(
                model,
                EngineOptions(threads=1, store=tmp_path / "store"),
                peers=[peer.address],
                progress=on_progress,
            ):
                pytest.fail("loaded")
        assert time.monotonic() - begun < DEAD_S
    assert whole_slices(peer.store) == []
    with PeerProcess(peer.store) as peer:
        async with Engine.connect(
            model, EngineOptions(threads=1, store=tmp_path / "store"), peers=[peer.address]
        ) as engine:
            await engine.complete([1, 2], SamplingParams(max_tokens=2))
    assert len(whole_slices(peer.store)) == 1
    assert list(peer.store.glob(".*")) == []  # what the dead one had begun is cleared away


async def test_error_while_cutting_a_slice_is_told_as_it_is(
    model: Path, peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a cancellation, which is what gRPC makes of an error in what it sends."""
    from tpirt.cluster import provision as slices
    from tpirt.errors import CheckpointError

    (peer,) = peers(1)

    def broken(_: object) -> Generator[UnitChunk]:
        raise CheckpointError("model.safetensors: the disk says no")
        yield

    monkeypatch.setattr(slices, "unit_chunks", broken)
    with pytest.raises(CheckpointError, match="the disk says no"):
        async with Engine.connect(
            model, EngineOptions(threads=1, store=tmp_path / "store"), peers=[peer.address]
        ):
            pytest.fail("loaded")
    assert whole_slices(peer.store) == []
    wait_for(lambda: not list(peer.store.glob(".*")), "cleared away")


@pytest.mark.usefixtures("warm_workers")
async def test_local_workers_end_with_the_engine_whatever_happened(
    model: Path, tmp_path: Path
) -> None:
    before = {process.pid for process in descendants()}
    workers = []
    with suppress(PeerLostError):
        async with Engine.connect(
            model,
            EngineOptions(threads=1, store=tmp_path / "store"),
            local=3,
            progress=ignore_progress,
        ) as engine:
            workers = [p for p in descendants() if p.pid not in before]
            assert len(workers) == 2
            seconds = await lose(
                engine, [1, 2, 3], lambda _: os.kill(workers[1].pid, signal.SIGKILL)
            )
            assert seconds < DEAD_S
    assert survivors(workers) == []


@pytest.mark.parametrize("stage", [nightly("worker dies"), "Ctrl-C", "master dies"])
def test_command_ends_clean_when_it_is_interrupted_while_it_generates(
    model: Path, tmp_path: Path, stage: str
) -> None:
    arguments = ["generate", "--model", str(model), "--prompt", "abc", "--max-tokens", "500"]
    # Of two workers, none may hold the end of the other's pipe that dies with the master.
    ranks = 3 if stage == "master dies" else 2
    arguments += ["--local", str(ranks), "--threads", "1", "--store", str(tmp_path), "--quiet"]
    with killed_at_exit(start_cli(*arguments)) as master:
        assert master.stdout is not None
        assert master.stdout.read(5)  # it generates
        workers = descendants(master.pid)
        assert len(workers) == ranks - 1
        if stage == "worker dies":
            workers[0].kill()
        else:
            master.send_signal(signal.SIGINT if stage == "Ctrl-C" else signal.SIGKILL)
        _, err = master.communicate(timeout=20)
        assert survivors(workers) == []
    assert "Traceback" not in err
    if stage == "worker dies":  # this process goes on alone
        assert (master.returncode, err) == (0, "")
    elif stage == "Ctrl-C":
        assert (master.returncode, err) == (130, "tpirt: interrupted\n")


MASTER = """
import asyncio, os, signal, sys
from tpirt.engine import Engine, EngineOptions

def report(progress):
    if progress.stage == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    options = EngineOptions(threads=1, store=sys.argv[3], chunk_tokens=16)
    async with Engine.connect(sys.argv[1], options, peers=[sys.argv[2]], progress=report) as engine:
        async for token in engine.generate([7] * 100, progress=report):
            if sys.argv[4] == "decode":
                os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_worker_serves_the_next_master_after_one_was_killed(
    model: Path, peers: Peers, tmp_path: Path
) -> None:
    (peer,) = peers(1)
    store = str(tmp_path / "store")
    for stage in ("sending slice", "loading weights", "prefill", "decode"):
        killed = await asyncio.to_thread(
            run_python, "-c", MASTER, str(model), peer.address, store, stage, text=True
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if stage == "sending slice":
            wait_for(lambda: not list(peer.store.glob(".*")), "the half slice is gone", DEAD_S)
            assert whole_slices(peer.store) == []
        else:
            wait_for(lambda: peer.log.rstrip().endswith("waiting for a master"), stage, DEAD_S)
        async with Engine.connect(
            model, EngineOptions(threads=1, store=store), peers=[peer.address]
        ) as engine:
            await engine.complete([1, 2], SamplingParams(max_tokens=2))
        assert peer.log.count("received slice") == 1
        wait_for(lambda: peer.log.rstrip().endswith("waiting for a master"), stage, DEAD_S)
    assert "Traceback" not in peer.log


async def test_a_peer_that_is_stopped_waits_for_nobody(model: Path, tmp_path: Path) -> None:
    options = EngineOptions(threads=1, store=tmp_path / "store")
    with PeerProcess(tmp_path / "peer") as peer:
        async with Engine.connect(model, options, peers=[peer.address]):
            peer.signal(signal.SIGINT)
            wait_for(lambda: not peer.alive, "end of the peer")
        assert "serving" in peer.log
        assert "waiting for a master" not in peer.log
