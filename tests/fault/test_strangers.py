"""Callers that nobody knows: what they send is refused, and keeps nobody else from being served."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tpirt.batch import Batch, Segment
from tpirt.cluster import uploads, worker_links
from tpirt.cluster import worker as worker_module
from tpirt.cluster.rank import RankRuntime
from tpirt.cluster.worker import Worker
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import (
    HandshakeError,
    PeerError,
    StoreError,
    TpirtError,
    TransportError,
)
from tpirt.protocol.link import Incoming, Link, message_frame
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    ClockRequest,
    Failure,
    FreeSlot,
    HelloReply,
    HelloRequest,
    InventoryReply,
    InventoryRequest,
    Ready,
    Setup,
    UnitChunk,
    decode_call,
    encode_call,
)
from tpirt.testing.cluster import MemoryPeerClient
from tpirt.testing.processes import PeerProcess
from tpirt.transport.backlog import Backlog
from tpirt.transport.frame import Frame, FrameReader, Header, Kind
from tpirt.transport.grpc import GrpcPeerClient
from tpirt.transport.memory import memory_pair
from tpirt.types import ProgressCallback, SamplingParams
from tpirt.weights.manifest import NO_DIGEST, Manifest, SliceOrder, SliceSpec, split_digests
from tpirt.weights.store import SliceStore
from tpirt.weights.writer import SliceWriter

PROMPT = list(range(40, 64))
PARAMS = SamplingParams(max_tokens=4)
HELLO = encode_call(HelloRequest(PROTOCOL_VERSION, "x"))
WAIT_S = 10.0


class Nobody:
    """A link's handler that remembers its end."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[TpirtError] = asyncio.get_running_loop().create_future()

    def on_message(self, link: Link, incoming: Incoming) -> None:
        pass

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        self.lost.set_result(exc)


class Caller:
    """A master's side of a session that says what it likes."""

    def __init__(self, client: MemoryPeerClient, link: Link, handler: Nobody):
        self.client, self.link, self.handler = client, link, handler

    @classmethod
    async def of(cls, worker: Worker) -> Caller:
        client, handler = MemoryPeerClient(worker), Nobody()
        link = Link(await client.open_session(), 1, WAIT_S, handler)
        link.start()
        return cls(client, link, handler)

    async def refused(self) -> TpirtError:
        """Wait for the worker to end the session; returns why it did."""
        async with asyncio.timeout(WAIT_S):
            await self.handler.lost
        await eventually(lambda: self.client.session_errors)
        return self.client.session_errors[-1]

    async def aclose(self) -> None:
        await self.link.aclose()
        await self.client.aclose()


@pytest.fixture
def store(tmp_path: Path) -> SliceStore:
    return SliceStore(tmp_path / "store")


@pytest.fixture
def worker(store: SliceStore) -> Worker:
    return Worker("w", store, None, 1, lambda _: None)


@asynccontextmanager
async def master(model: Path, tmp_path: Path, worker: Worker) -> AsyncIterator[Engine]:
    options = EngineOptions(dtype="float32", threads=1, store=str(tmp_path / "m"), chunk_tokens=8)
    async with Engine.connect(model, options, peers=[MemoryPeerClient(worker)]) as engine:
        yield engine


async def tokens(engine: Engine) -> list[int]:
    return (await engine.complete(PROMPT, PARAMS)).token_ids


@pytest.fixture
async def held(model: Path, tmp_path: Path, worker: Worker, store: SliceStore) -> Manifest:
    """The slice that the worker holds once a master has used it."""
    async with master(model, tmp_path, worker) as engine:
        await tokens(engine)
    (stored,) = (s for s in store.slices() if s.manifest.shard.first is False)
    return stored.manifest


def setup_of(manifest: Manifest, **changes: Any) -> Setup:
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "model_fingerprint": manifest.fingerprint,
        "model_config": manifest.spec.config.to_json(),
        "slice_id": manifest.slice_id,
        "rank": 1,
        "world_size": 2,
        "window_blocks": None,
        "memory_bytes": None,
        "chunk_tokens": 8,
        "timeout_ms": 10_000,
        "trace_spans": 0,
        "session": 7,
        "addresses": (),
    }
    return Setup(**(fields | changes))


# -- frames ------------------------------------------------------------------------------------


def test_an_announced_size_takes_no_memory_before_the_bytes_come() -> None:
    reader = FrameReader("p", limit=1 << 30)
    before = psutil.Process().memory_info().rss
    assert list(reader.feed(Header(Kind.MESSAGE, payload_bytes=1 << 30).pack())) == []
    assert psutil.Process().memory_info().rss - before < 64 << 20
    reader.close()
    assert list(reader.feed(b"x" * 1000)) == []


async def test_nothing_large_is_accepted_before_a_setup(worker: Worker) -> None:
    caller = await Caller.of(worker)
    await caller.link.channel.send(Frame.of(Kind.MESSAGE, b"", bytes(100_000)))
    assert "a frame of 100000 bytes, at most 65536" in str(await caller.refused())
    await caller.aclose()


async def test_requests_whose_replies_are_not_read_end_the_session(worker: Worker) -> None:
    client = MemoryPeerClient(worker, capacity=4096)
    channel = await client.open_session()
    with suppress(TpirtError):
        async with asyncio.timeout(WAIT_S):
            for number in range(1, 5000):
                await channel.send(message_frame(Kind.REQUEST, ClockRequest(), number=number))
    await eventually(lambda: client.session_errors)
    assert "reads no replies" in str(client.session_errors[0])
    await client.aclose()


async def test_messages_that_pile_up_are_bounded_in_bytes(held: Manifest, worker: Worker) -> None:
    caller = await Caller.of(worker)
    await caller.link.request(setup_of(held))
    # A step whose tensors never come keeps the worker from taking up what follows.
    step = Batch((Segment(slot=0, position=0, tokens=1, num_logits=1, rope_length=1),))
    hidden = bytes(4 * held.spec.config.hidden_size)
    await caller.link.send(message_frame(Kind.MESSAGE, step, hidden, step=1, dtype=1))
    large = message_frame(Kind.REQUEST, FreeSlot(1), bytes(6 << 20), 99)
    with suppress(TpirtError):
        for _ in range(8):
            await caller.link.send(large)
    assert "too many messages at once" in str(await caller.refused())
    await caller.aclose()


# -- sessions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chunk_tokens": 513}, "a context of 512 tokens"),
        ({"rank": 9, "world_size": 100}, "the model has 8 heads"),
        ({"timeout_ms": 2**32 - 1}, "invalid Setup"),
        ({"timeout_ms": 1}, "invalid Setup"),
        ({"rank": 2**32 - 1, "world_size": 2**32 - 1}, "the model has 8 heads|invalid Setup"),
        ({"window_blocks": 0}, "at least 2"),
        ({"memory_bytes": 1}, "too low"),
        ({"model_config": "[" * 30_000}, "JSON"),
        ({"model_config": '{"a":' + "[" * 980 + "]" * 980 + "}"}, "JSON|missing key"),
        ({"model_config": '{"vocab_size":' + "9" * 50_000 + "}"}, "JSON"),
        ({"slice_id": "../../../../etc/passwd"}, "24 hexadecimal digits"),
        ({"slice_id": "9" * 50_000}, "slice id '9{40}': expected 24 hexadecimal digits"),
    ],
)
async def test_setups_that_ask_for_too_much_are_refused(
    held: Manifest, worker: Worker, change: dict[str, Any], reason: str
) -> None:
    caller = await Caller.of(worker)
    with pytest.raises(TpirtError, match=reason):
        await caller.link.request(setup_of(held, **change))
    await caller.aclose()


async def test_silent_sessions_keep_no_master_out(
    model: Path, tmp_path: Path, worker: Worker
) -> None:
    silent = [await Caller.of(worker) for _ in range(40)]
    async with asyncio.timeout(WAIT_S), master(model, tmp_path, worker) as engine:
        assert len(await tokens(engine)) == PARAMS.max_tokens
    crowded = [caller for caller in silent if caller.client.session_errors]
    assert crowded == silent[: len(crowded)]  # the oldest ones
    assert "too many others" in str(crowded[0].client.session_errors[0])
    await asyncio.gather(*(caller.aclose() for caller in silent))


async def test_a_session_that_is_used_is_protected_and_one_that_is_not_gives_way(
    model: Path, tmp_path: Path, held: Manifest, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = await Caller.of(worker)
    await idle.link.request(setup_of(held))
    second = await Caller.of(worker)
    with pytest.raises(HandshakeError, match="it serves"):
        await second.link.request(setup_of(held))
    await second.aclose()
    assert await busy(worker)
    monkeypatch.setattr(worker_module, "_UNUSED_S", -1.0)
    assert not await busy(worker)
    async with master(model, tmp_path, worker) as engine:
        monkeypatch.undo()
        await tokens(engine)
        assert "not used" in str(await idle.refused())
    await idle.aclose()


async def test_a_session_that_loads_or_runs_a_step_is_not_idle(
    model: Path, tmp_path: Path, held: Manifest, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes."""
    monkeypatch.setattr(worker_module, "_UNUSED_S", 0.0)
    seen: list[tuple[str, float]] = []
    load, run = RankRuntime.load, RankRuntime.run

    def note(name: str, runtime: RankRuntime) -> None:
        if worker._session is not None and runtime.comm.rank == 1:
            seen.append((name, worker._session.unused_s))

    async def loading(self: RankRuntime, progress: ProgressCallback) -> None:
        await asyncio.sleep(0)
        note("load", self)
        await load(self, progress)

    async def running(self: RankRuntime, *arguments: Any) -> torch.Tensor | None:
        await asyncio.sleep(0)
        note("step", self)
        return await run(self, *arguments)

    monkeypatch.setattr(RankRuntime, "load", loading)
    monkeypatch.setattr(RankRuntime, "run", running)
    async with master(model, tmp_path, worker) as engine:
        await tokens(engine)
    assert {name for name, _ in seen} == {"load", "step"}
    assert not any(idle_s for _, idle_s in seen)


async def busy(worker: Worker) -> bool:
    return decode_call(HelloReply, await worker.answer("Hello", HELLO), "w").busy


async def test_a_call_that_is_cancelled_while_its_session_ends_frees_the_worker(
    model: Path, tmp_path: Path, held: Manifest, worker: Worker, store: SliceStore
) -> None:
    for turns in range(12):  # of the loop, between the master's end and the call's
        mine, theirs = memory_pair("w", "master")
        serving = asyncio.create_task(worker.session(theirs))
        link = Link(mine, 1, WAIT_S, Nobody())
        link.start()
        await link.request(setup_of(held))
        await link.aclose()
        for _ in range(turns):
            await asyncio.sleep(0)
        serving.cancel()
        await asyncio.wait({serving})
    assert not await busy(worker)
    (used,) = store.matching([held.slice_id])
    store.remove(used)  # raises while a session uses it
    async with asyncio.timeout(WAIT_S), master(model, tmp_path, worker) as engine:
        await tokens(engine)


async def test_a_failed_link_tells_nothing_of_what_is_at_an_address(
    held: Manifest, store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_links, "PATIENCE_S", 0.3)
    asked: list[str] = []

    def connect(address: str) -> GrpcPeerClient:
        asked.append(address)
        return GrpcPeerClient(address)

    worker = Worker("w", store, None, 1, lambda _: None, connect)
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as mute, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        states = set()
        for port in (mute.getsockname()[1], closed.getsockname()[1]):
            caller = await Caller.of(worker)
            address, started = f"127.0.0.1:{port}", loop.time()
            setup = setup_of(held, rank=2, world_size=3, addresses=("", address, "x:1"))
            ready = (await caller.link.request(setup)).body
            assert isinstance(ready, Ready)
            assert loop.time() - started >= 0.3
            states.add(ready.links)
            await caller.aclose()
        refused = await Caller.of(worker)
        with pytest.raises(StoreError, match="holds no slice"):
            await refused.link.request(
                setup_of(held, slice_id="0" * 24, rank=2, world_size=3, addresses=("", "a:1", ""))
            )
        await refused.aclose()
    assert len(states) == 1
    assert "a:1" not in asked  # no connection for a slice that is not here


# -- uploads -----------------------------------------------------------------------------------


def order_of(manifest: Manifest, **changes: Any) -> bytes:
    text = SliceOrder(manifest.spec, [NO_DIGEST] * len(manifest.digests)).to_json()
    return encode_call(UnitChunk(order=json.dumps({**json.loads(text), **changes})))


async def messages(*first: bytes, then: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    for message in first:
        yield message
    if then is not None:
        await then.wait()


def chunks_of(spec: SliceSpec) -> list[bytes]:
    found = []
    for number in range(len(spec.places)):
        data = os.urandom(spec.unit_bytes(number))
        found.append(encode_call(UnitChunk(unit=number, crc32=zlib.crc32(data), data=data)))
    return found


def partial_folders(store: SliceStore) -> list[Path]:
    return list(store.root.glob(".partial-*"))


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_silent_upload_ends_when_somebody_asks_what_is_missing(
    held: Manifest, worker: Worker, store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sender is back, whose connection was cut: it sends the rest."""
    monkeypatch.setattr(uploads, "_GIVES_WAY_S", 0.0)
    wanted = dataclasses.replace(held.spec, fingerprint="f" * 32)
    units = sum(block == 0 for block, _ in wanted.places)
    sent, silent = chunks_of(wanted)[: units + 1], asyncio.Event()

    async def cut() -> AsyncIterator[bytes]:
        for message in (order_of(held, fingerprint="f" * 32), *sent):
            yield message
        silent.set()
        await asyncio.Event().wait()

    uploading = asyncio.ensure_future(worker.receive("PutUnits", cut()))
    await silent.wait()
    order = SliceOrder(wanted, [NO_DIGEST] * len(wanted.places))
    request = encode_call(InventoryRequest(order=order.to_json()))
    reply = decode_call(InventoryReply, await worker.answer("Inventory", request), "worker")
    assert sum(digest != NO_DIGEST for digest in split_digests(reply.held)) == units
    with pytest.raises(TransportError, match="stands still"):
        await uploading


async def test_uploads_that_stand_still_end_or_give_way(
    held: Manifest, worker: Worker, store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent: list[int] = []

    async def order_then_silence(number: int) -> AsyncIterator[bytes]:
        yield order_of(held, fingerprint=str(number))
        silent.append(number)  # the worker waits for the next message
        await asyncio.Event().wait()

    async def idle(number: int) -> bytes:
        return await worker.receive("PutUnits", order_then_silence(number))

    running = [asyncio.ensure_future(idle(n)) for n in range(uploads.MOST_UPLOADS)]
    await eventually(lambda: len(silent) == uploads.MOST_UPLOADS)
    assert len(partial_folders(store)) == uploads.MOST_UPLOADS
    with pytest.raises(PeerError, match="receives 4 slices already"):
        await idle(9)
    monkeypatch.setattr(uploads, "_GIVES_WAY_S", 0.0)
    monkeypatch.setattr(uploads, "PATIENCE_S", 0.2)
    with pytest.raises(TransportError, match="stands still"):
        await idle(10)  # one of the others gave way to it
    done, rest = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    with pytest.raises(TransportError, match="stands still"):
        done.pop().result()
    for task in rest:
        task.cancel()
    await asyncio.wait(rest)
    assert partial_folders(store) == []


@pytest.mark.parametrize("turns_apart", range(4))
async def test_one_silent_upload_gives_way_to_one_other(
    held: Manifest,
    worker: Worker,
    store: SliceStore,
    monkeypatch: pytest.MonkeyPatch,
    turns_apart: int,
) -> None:
    """Also while it ends: others can come a few turns of the event loop after each other."""
    begun: list[int] = []

    async def idle(number: int) -> bytes:
        async def order_then_silence() -> AsyncIterator[bytes]:
            yield order_of(held, fingerprint=str(number))
            begun.append(number)
            await asyncio.Event().wait()

        return await worker.receive("PutUnits", order_then_silence())

    first = [asyncio.ensure_future(idle(n)) for n in range(uploads.MOST_UPLOADS)]
    await eventually(lambda: len(begun) == uploads.MOST_UPLOADS)
    monkeypatch.setattr(uploads, "_GIVES_WAY_S", 0.0)
    later = []
    for number in range(10, 13):
        later.append(asyncio.ensure_future(idle(number)))
        for _ in range(turns_apart):
            await asyncio.sleep(0)
    await eventually(lambda: len(begun) == uploads.MOST_UPLOADS + len(later))
    assert len(partial_folders(store)) == uploads.MOST_UPLOADS
    for task in (*first, *later):
        task.cancel()
    ends = await asyncio.gather(*first, *later, return_exceptions=True)
    assert sum(isinstance(end, TransportError) for end in ends) == len(later)


async def test_what_is_missing_is_said_although_a_silent_upload_does_not_end(
    held: Manifest, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk may hang."""
    close, go_on, silent = SliceWriter.close, threading.Event(), asyncio.Event()

    def hung(self: SliceWriter) -> None:
        assert go_on.wait(WAIT_S)
        close(self)

    async def cut() -> AsyncIterator[bytes]:
        yield order_of(held, fingerprint="f" * 32)
        silent.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(SliceWriter, "close", hung)
    monkeypatch.setattr(uploads, "_GIVES_WAY_S", 0.0)
    monkeypatch.setattr(uploads, "_ENDS_WITHIN_S", 0.05)
    uploading = asyncio.ensure_future(worker.receive("PutUnits", cut()))
    await silent.wait()
    request = encode_call(
        InventoryRequest(order=decode_call(UnitChunk, await anext(cut()), "caller").order)
    )
    try:
        await asyncio.wait_for(worker.answer("Inventory", request), WAIT_S / 2)
        assert not uploading.done()
    finally:
        go_on.set()
    with pytest.raises(TransportError, match="stands still"):
        await uploading


async def test_cancelled_uploads_leave_nothing(
    held: Manifest, worker: Worker, store: SliceStore
) -> None:
    never, files = asyncio.Event(), psutil.Process().num_fds()
    for number in range(20):
        first = order_of(held, fingerprint=str(number))
        task = asyncio.ensure_future(worker.receive("PutUnits", messages(first, then=never)))
        await asyncio.sleep(0.001 * (number % 7))
        task.cancel()
        await asyncio.wait({task})
    assert partial_folders(store) == []
    assert psutil.Process().num_fds() <= files


async def test_an_upload_without_data_ends(held: Manifest, worker: Worker) -> None:
    empty = encode_call(UnitChunk(unit=0))
    with pytest.raises(TransportError, match="empty"):
        await worker.receive("PutUnits", messages(order_of(held), empty))
    with pytest.raises(TransportError, match="begin with its order"):
        await worker.receive("PutUnits", messages())


async def test_uploads_side_by_side_share_the_room_that_is_left(
    held: Manifest, tmp_path: Path
) -> None:
    size = held.spec.nbytes
    store = SliceStore(tmp_path / "small", limit_bytes=2 * size + size // 2)
    worker = Worker("w", store, None, 1, lambda _: None)
    go = asyncio.Event()

    async def upload(number: int) -> bytes:
        async def sent() -> AsyncIterator[bytes]:
            yield order_of(held, fingerprint=str(number))
            await go.wait()
            for chunk in chunks_of(held.spec):
                yield chunk

        return await worker.receive("PutUnits", sent())

    running = [asyncio.ensure_future(upload(n)) for n in range(3)]
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=WAIT_S)
    with pytest.raises(StoreError, match="limit"):
        done.pop().result()
    go.set()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert sum(isinstance(result, bytes) for result in results) == 2
    assert store.bytes_used() <= 2 * size + size // 2


async def test_an_upload_changes_nothing_of_the_slice_in_use(
    model: Path, tmp_path: Path, held: Manifest, worker: Worker, store: SliceStore
) -> None:
    stored = store.find(held.slice_id)
    assert stored is not None
    same = [
        encode_call(UnitChunk(unit=number, crc32=zlib.crc32(data), data=data))
        for number, data in enumerate(
            bytes(content)
            for index, units in enumerate(held.spec.units)
            for _, content in stored.units(index, units)
        )
    ]
    go = asyncio.Event()

    async def upload(chunks: list[bytes]) -> bytes:
        async def sent() -> AsyncIterator[bytes]:
            yield order_of(held)
            await go.wait()
            for chunk in chunks:
                yield chunk

        return await worker.receive("PutUnits", sent())

    running = [asyncio.ensure_future(upload(c)) for c in (same, chunks_of(held.spec))]
    await eventually(lambda: len(partial_folders(store)) == 2)
    async with master(model, tmp_path, worker) as engine:
        before = await tokens(engine)
        file = stored.block_path(0).stat()
        go.set()
        await asyncio.gather(*running)
        assert await tokens(engine) == before
        assert stored.block_path(0).stat().st_ino == file.st_ino
    async with master(model, tmp_path, worker) as engine:
        assert await tokens(engine) == before


def test_an_order_costs_no_more_than_its_digests(held: Manifest) -> None:
    order = json.loads(SliceOrder(held.spec, held.digests).to_json())
    config = {**order["config"], "num_hidden_layers": 9000, "sliding_windows": [None] * 9000}
    text = json.dumps({**order, "config": config})
    with pytest.raises(StoreError, match="digests are not those"):
        SliceOrder.from_json(text)


def test_an_order_of_many_values_takes_no_memory(held: Manifest) -> None:
    """4 MB of JSON could become 100 MB of lists, and keep everyone else waiting for a second."""
    order = SliceOrder(held.spec, held.digests).to_json()
    text = order.replace('"digests"', '"more": [' + "[]," * 100_000 + '0], "digests"')
    tracemalloc.start()
    with pytest.raises(StoreError, match="more than 20,000 values"):
        SliceOrder.from_json(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("depth", [300, 900, 960, 990, 100_000])
def test_deep_json_in_an_order_is_refused(held: Manifest, depth: int) -> None:
    order = SliceOrder(held.spec, held.digests).to_json()
    fields = json.loads(order)
    fields["config"] = 0
    text = json.dumps(fields).replace('"config": 0', '"config": ' + "[" * depth + "]" * depth)
    with pytest.raises(StoreError, match="slice manifest"):
        SliceOrder.from_json(text)


async def test_questions_about_the_store_are_few_at_a_time(held: Manifest, worker: Worker) -> None:
    order = SliceOrder(held.spec, held.digests).to_json()
    asked = encode_call(InventoryRequest(order=order))
    answers = await asyncio.gather(
        *(worker.answer("Inventory", asked) for _ in range(100)), return_exceptions=True
    )
    refused = [answer for answer in answers if isinstance(answer, PeerError)]
    assert 0 < len(refused) < 100
    assert await worker.answer("Inventory", asked)


# -- text of others ----------------------------------------------------------------------------


def test_text_of_others_is_printable(held: Manifest) -> None:
    ugly = "a\x1b[31mred\x07\r\nlist\x9b2J\u202e"
    fields = {**json.loads(SliceOrder(held.spec, held.digests).to_json()), "model": ugly}
    assert SliceOrder.from_json(json.dumps(fields)).spec.model.isprintable()
    failure = decode_call(Failure, encode_call(Failure(1, "StoreError", ugly)), "p")
    assert str(failure.error("p")).isprintable()
    assert failure.message == "a?[31mred???list?2J?"


# -- the backlog -------------------------------------------------------------------------------


async def test_the_caller_that_is_silent_for_longest_gives_way() -> None:
    backlog, said = Backlog(2), asyncio.Event()

    async def caller(number: int) -> int:
        await said.wait()
        return number

    waiting = []
    for number in range(5):
        waiting.append(asyncio.ensure_future(backlog.wait(f"h:{number}", caller(number))))
        await asyncio.sleep(0)
    said.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(r) for r in results[:3]] == [TransportError] * 3
    assert results[3:] == [3, 4]


async def test_the_host_that_has_most_callers_gives_way() -> None:
    backlog, said = Backlog(3), asyncio.Event()

    async def caller(name: str) -> str:
        await said.wait()
        return name

    waiting = []
    for name in ("one:1", "many:2", "many:3", "many:4", "many:5"):
        waiting.append(asyncio.ensure_future(backlog.wait(name, caller(name))))
        await asyncio.sleep(0)
    said.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [r for r in results if isinstance(r, str)] == ["one:1", "many:4", "many:5"]


# -- a real peer -------------------------------------------------------------------------------


async def test_silent_connections_and_calls_keep_no_master_out(model: Path, tmp_path: Path) -> None:
    options = EngineOptions(dtype="float32", threads=1, store=str(tmp_path / "m"))
    with PeerProcess(tmp_path / "peer") as peer, ExitStack() as connections:

        async def serve() -> None:
            async with (
                asyncio.timeout(20),
                Engine.connect(model, options, peers=[peer.address]) as engine,
            ):
                assert len(await tokens(engine)) == PARAMS.max_tokens

        await serve()  # the first session reads code into memory: 70 MiB of torch's CUDA build
        port = int(peer.address.rpartition(":")[2])
        process = psutil.Process(peer.pid)
        for where in (port, port + 1000):
            for _ in range(200):
                with suppress(OSError):
                    silent = socket.create_connection(("127.0.0.1", where), timeout=2)
                    connections.enter_context(silent)
        stranger = GrpcPeerClient(peer.address)
        sessions = [await stranger.open_session() for _ in range(6)]
        threads, before = process.num_threads(), process.memory_info().rss
        await serve()
        assert process.memory_info().rss - before < 64 << 20
        assert process.num_threads() <= threads + 16
        for session in sessions:
            await session.aclose()
        await stranger.aclose()
