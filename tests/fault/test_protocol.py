"""Messages that lie: refused, named and used for nothing; never a wrong token, never a hang."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpirt.batch import SCALE_BLOCK, Batch, Segment
from tpirt.cluster.worker import Worker
from tpirt.errors import TpirtError
from tpirt.protocol.link import Link, message_frame
from tpirt.protocol.messages import PROTOCOL_VERSION, Abort, Ready, Setup
from tpirt.testing.cluster import memory_engine, same_channel
from tpirt.testing.faults import Fault, FaultyChannel
from tpirt.testing.models import make_model
from tpirt.testing.ranks import Inbox
from tpirt.transport.base import Channel
from tpirt.transport.frame import Kind
from tpirt.transport.memory import memory_pair
from tpirt.types import RECONNECTED, Progress, SamplingParams
from tpirt.weights.store import SliceStore

HIDDEN = 3 * SCALE_BLOCK
PROMPT = list(range(40, 64))
PARAMS = SamplingParams(max_tokens=6)
SHORT_S = 0.8  # what a silent peer is given here

# Late is not wrong; twice is harmless where nobody waits for the second one any more.
MAY_SUCCEED = {Fault.DUPLICATE, Fault.REORDER}
AFTER = (0, 3, 30)  # tensors of 3 steps of prefill and 5 of decode
STEPS_AFTER = (0, 1, 7)  # the first, one of the prefill, the last
QUICK_AFTER = {1, 3}
EVERY_FAULT = {("star", "worker", "partial"), ("star", "master", "step")}  # in CI
A_FAULT = {"worker": Fault.WRONG_SEQ, "master": Fault.DROP}  # of the other ways
TENSOR_FAULTS = [fault for fault in Fault if fault is not Fault.DELAY]
STEP_FAULTS = [
    fault
    for fault in TENSOR_FAULTS
    if fault.name not in ("WRONG_DTYPE", "WRONG_SHAPE", "WRONG_SEQ")
]
WAYS = [
    ("star", "worker", "partial"),
    ("star", "master", "reduced"),
    ("star", "master", "step"),
    *(
        (algorithm, side, kind)
        for algorithm, kind in (
            ("one-shot", "partial"),
            ("two-shot", "partial"),
            ("two-shot", "reduced"),
        )
        for side in ("worker", "master")
    ),
]


def cases() -> Iterator[Any]:
    """Every fault of every frame at three times; but for a selection, at night.

    A link checks all tensors alike: CI has every fault of one kind of them.
    """
    for algorithm, side, kind in WAYS:
        every = (algorithm, side, kind) in EVERY_FAULT
        for fault in STEP_FAULTS if kind == "step" else TENSOR_FAULTS:
            for after in STEPS_AFTER if kind == "step" else AFTER:
                quick = after in QUICK_AFTER and (every or fault is A_FAULT[side])
                yield pytest.param(
                    *(algorithm, side, kind, fault, after),
                    marks=() if quick else pytest.mark.nightly,
                    id=f"{algorithm}-{side}-{kind}-{fault.name}-{after}",
                )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which two-shot gives each of three ranks a share even of a single token."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    return make_model(path, hidden_size=HIDDEN, intermediate_size=48, head_dim=8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def expected(model: Path, store: Path) -> list[int]:
    """What three ranks answer when nothing goes wrong."""

    async def answer() -> list[int]:
        async with memory_engine(model, 3, store=store, chunk_tokens=8) as engine:
            return (await engine.complete(PROMPT, PARAMS)).token_ids

    return asyncio.run(answer())


@pytest.mark.parametrize(("algorithm", "side", "kind", "fault", "after"), list(cases()))
async def test_faulty_message_is_refused_and_its_sender_connected_again(
    model: Path,
    store: Path,
    expected: list[int],
    algorithm: str,
    side: str,
    kind: str,
    fault: Fault,
    after: int,
) -> None:
    faulty_channels: list[FaultyChannel] = []

    def faulty(rank: int, channel: Channel) -> Channel:
        if rank != 2 or faulty_channels:
            return channel
        faulty_channels.append(FaultyChannel(channel, fault, after=after, kind=kind))
        return faulty_channels[-1]

    async with (
        asyncio.timeout(20),
        memory_engine(
            model,
            3,
            store=store,
            chunk_tokens=8,
            timeout_s=SHORT_S,
            collective=algorithm,
            master_side=faulty if side == "master" else same_channel,
            worker_side=faulty if side == "worker" else same_channel,
        ) as engine,
    ):
        tokens: list[int] = []
        stages: set[str] = set()

        def report(progress: Progress) -> None:
            stages.add(progress.stage)

        async def request() -> None:
            async for token in engine.generate(PROMPT, PARAMS, report):
                tokens.append(token.id)

        try:
            async with asyncio.timeout(2 if fault in MAY_SUCCEED else None):
                await request()
        except TimeoutError:  # both wait for each other, alive; the user may give up
            tokens = (await engine.complete(PROMPT, PARAMS, report)).token_ids
        assert faulty_channels[0].fired.is_set()
        assert tokens == expected
        assert fault in MAY_SUCCEED or RECONNECTED in stages


async def test_slow_peer_changes_nothing(model: Path, store: Path, expected: list[int]) -> None:
    def slow(_: int, channel: Channel) -> Channel:
        return FaultyChannel(channel, Fault.DELAY, after=5, delay_s=0.5)

    async with memory_engine(
        model, 3, store=store, chunk_tokens=8, timeout_s=10, worker_side=slow
    ) as engine:
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected


# -- a master that lies to a worker ----------------------------------------------------------


def setup(**changes: Any) -> Setup:
    good = Setup(
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint="f" * 32,
        model_config="{}",
        slice_id="0" * 24,
        rank=1,
        world_size=2,
        window_blocks=None,
        memory_bytes=None,
        chunk_tokens=16,
        timeout_ms=1000,
        trace_spans=0,
        session=1,
        addresses=(),
    )
    return replace(good, **changes)


async def first_answer(store: Path, body: object) -> str:
    """Begin a session with ``body``; returns how the worker takes it."""
    service = Worker("w", SliceStore(store), None, 1, lambda _: None)
    mine, theirs = memory_pair("w", "master")
    session = asyncio.create_task(service.session(theirs))
    link = Link(mine, 1, 5.0, Inbox())
    link.start()
    try:
        async with asyncio.timeout(20):
            with pytest.raises(TpirtError) as caught:
                await link.request(body)
            await asyncio.wait({session})
    finally:
        await link.aclose()
    return f"{caught.value} {session.exception()}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (Ready(1, 1), "expected Setup, got Ready"),
        (Abort(1), "expected Setup, got Abort"),
        (setup(protocol_version=99), "update tpirt on the peer"),
        (setup(rank=2), "invalid Setup"),
        (setup(rank=0), "invalid Setup"),
        (setup(chunk_tokens=0), "invalid Setup"),
        (setup(timeout_ms=0), "invalid Setup"),
        (setup(addresses=("a",)), "invalid Setup"),
        (setup(kv_bits=3), "a KV cache of 3 bits"),
        (setup(), "missing"),
        (setup(model_config="["), "JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_worker_refuses_an_invalid_setup(tmp_path: Path, body: object, expected: str) -> None:
    assert expected in await first_answer(tmp_path, body)


GOOD = Segment(slot=0, position=0, tokens=1, num_logits=1, rope_length=1)


@pytest.mark.parametrize(
    ("segment", "dtype"),
    [
        (replace(GOOD, position=5, rope_length=6), 1),  # nothing is cached there
        (replace(GOOD, tokens=0), 1),
        (replace(GOOD, tokens=9, rope_length=9), 1),  # more than a chunk
        (replace(GOOD, rope_length=10**6), 1),
        (replace(GOOD, position=2**63), 1),
        (replace(GOOD, num_logits=2), 1),  # more than there are
        (GOOD, 3),  # int8
        (GOOD, 2),  # bfloat16, of half as many bytes
    ],
)
async def test_worker_refuses_an_invalid_step(
    model: Path, store: Path, expected: list[int], segment: Segment, dtype: int
) -> None:
    """In the clear it may have been slipped in: the master connects again."""
    ends: list[Channel] = []

    def keep(_: int, channel: Channel) -> Channel:
        ends.append(channel)
        return channel

    async with memory_engine(model, 2, store=store, chunk_tokens=8, master_side=keep) as engine:
        payload = bytes(4 * HIDDEN * max(1, segment.tokens))
        shape = (segment.tokens, HIDDEN)
        step = message_frame(
            Kind.MESSAGE, Batch((segment,)), payload, step=1, dtype=dtype, shape=shape
        )
        await ends[0].send(step)
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
        (recovery,) = engine.recoveries
        assert recovery.peer_id == "memory:1"
