"""``--trace``: whole, on one clock, in the order that causes have; and not there unless wanted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.plans import allow_one_plan
from tpirt.cli.main import main
from tpirt.cluster import connection
from tpirt.cluster.roster import Answer
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import CheckpointError, PeerLostError, PeerUnreachableError, RequestError
from tpirt.protocol.messages import Clock, Setup, decode, encode
from tpirt.protocol.messages import Trace as TraceReply
from tpirt.stopwatch import LANES, Lane
from tpirt.testing.cluster import ChannelHook, memory_engine
from tpirt.testing.faults import Fault, FaultyChannel, frame_kind
from tpirt.testing.models import make_model
from tpirt.testing.processes import PeerProcess, killed_at_exit, start_cli
from tpirt.transport.base import Channel, PeerClient
from tpirt.transport.frame import Frame
from tpirt.types import SamplingParams

PROMPT = list(range(40, 64))
PARAMS = SamplingParams(max_tokens=6)
ROUNDING_US = 0.002


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slices")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


class Trace:
    """A trace file, checked against its format while it is read."""

    def __init__(self, file: Path):
        content = json.loads(file.read_text())
        self.about = content["otherData"]
        self.ranks: list[dict[str, Any]] = self.about["ranks"]
        self.instants: list[dict[str, Any]] = []
        self.lanes: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
        self.threads: dict[tuple[int, int], str] = {}
        self.processes: dict[int, str] = {}
        by_thread: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for event in content["traceEvents"]:
            match event["ph"]:
                case "M" if event["name"] == "thread_name":
                    self.threads[event["pid"], event["tid"]] = event["args"]["name"]
                case "M" if event["name"] == "process_name":
                    self.processes[event["pid"]] = event["args"]["name"]
                case "X":
                    assert event["ts"] >= 0
                    assert event["dur"] >= 0
                    thread = self.threads[event["pid"], event["tid"]]
                    assert thread in (event["cat"], f"{event['cat']} 2")
                    self.lanes[event["pid"], event["cat"]].append(event)
                    by_thread[event["pid"], event["tid"]].append(event)
                case "i":
                    self.instants.append(event)
                case kind:
                    assert kind == "M"
        for spans in by_thread.values():  # one after another: no two overlap in one thread
            for earlier, later in pairwise(spans):
                assert earlier["ts"] + earlier["dur"] <= later["ts"] + ROUNDING_US

    def uncertainty_us(self, rank: int) -> float:
        return float(self.ranks[rank]["clock_uncertainty_ms"]) * 1e3 + ROUNDING_US

    def steps(self, rank: int) -> dict[int, dict[str, Any]]:
        return {span["args"]["step"]: span for span in self.lanes[rank, "steps"]}

    def meetings(self, rank: int) -> dict[int, list[dict[str, Any]]]:
        found: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for span in self.lanes[rank, "network"]:
            if span["name"] != "send step":
                found[span["args"]["step"]].append(span)
        return found


def end(span: dict[str, Any]) -> float:
    return float(span["ts"] + span["dur"])


def check_whole(trace: Trace, world_size: int, decoded: int, layers: int = 3) -> None:
    """All lanes of all ranks are there, with what a whole answer leaves in them."""
    assert len(trace.ranks) == world_size
    assert set(trace.threads.values()) == set(LANES)
    assert len(trace.threads) == len(LANES) * world_size
    assert trace.processes[0] == "rank 0 master"
    for rank, about in enumerate(trace.ranks):
        assert (about["missing"], about["not_recorded"]) == ("", {})
        assert trace.processes[rank] == f"rank {rank} {about['peer']}"
        names = [step["name"] for step in trace.lanes[rank, "steps"]]
        assert names.count("decode") == decoded
        prefills = len(names) - decoded
        assert names == ["prefill"] * prefills + ["decode"] * decoded
        computed = [span["name"] for span in trace.lanes[rank, "compute"]]
        blocks = [f"layers.{i}.{kind}" for i in range(layers) for kind in ("attention", "mlp")]
        for block in blocks[:-1]:
            assert computed.count(block) == len(names)
        assert computed.count(blocks[-1]) == decoded + 1  # not where no result is wanted
        assert {span["name"] for span in trace.lanes[rank, "disk"]} >= set(blocks)
        assert all(span["args"]["bytes"] > 0 for span in trace.lanes[rank, "disk"])
        met = trace.meetings(rank)
        assert list(met) == list(trace.steps(rank))
        for number, spans in enumerate(met.values()):
            wanted = number >= prefills - 1  # the last chunk of the prompt, and all that follow
            kinds = [span["name"] for span in spans]
            assert kinds == ["all_reduce"] * (2 * layers - 2 + wanted) + ["reduce"]
            assert all(span["args"]["bytes"] > 0 for span in spans[: 2 * layers - 2 + 2 * wanted])
    tokens = [instant for instant in trace.instants if instant["name"].startswith("token")]
    assert [t["name"] for t in tokens] == [f"token {n}" for n in range(decoded + 1)]


def check_causality(trace: Trace) -> None:
    """Nothing is known before it was said, but for what the clocks are uncertain by."""
    master = trace.meetings(0)
    sent = [span for span in trace.lanes[0, "network"] if span["name"] == "send step"]
    begun = {span["args"]["step"]: span["ts"] for span in sent}
    for rank in range(1, len(trace.ranks)):
        slack = trace.uncertainty_us(rank)
        for step, spans in trace.meetings(rank).items():
            assert begun[step] <= trace.steps(rank)[step]["ts"] + slack
            for mine, theirs in zip(spans, master[step], strict=True):
                assert mine["ts"] <= end(theirs) + slack  # the sum holds this rank's part
                if mine["name"] == "all_reduce":
                    assert theirs["ts"] <= end(mine) + slack  # and this rank had the master's


def check_nesting(trace: Trace) -> None:
    """Whatever is computed or said belongs to a step."""
    for rank in range(len(trace.ranks)):
        steps = trace.lanes[rank, "steps"]
        for lane in ("compute", "network"):
            for span in trace.lanes[rank, lane]:
                if span["name"] == "wait disk" and span["ts"] < steps[0]["ts"]:
                    continue  # loading
                around = [s for s in steps if s["ts"] <= span["ts"] + ROUNDING_US]
                assert end(span) <= end(around[-1]) + ROUNDING_US, span


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("window", [None, 2])
async def test_trace_of_an_answer(
    model: Path, store: Path, file: Path, world_size: int, window: int | None
) -> None:
    options: dict[str, Any] = {"store": store, "window": window, "chunk_tokens": 8}
    async with memory_engine(model, world_size, trace=file, **options) as engine:
        await engine.complete(PROMPT, PARAMS)
        assert not file.exists()
    trace = Trace(file)
    check_whole(trace, world_size, decoded=5)
    check_causality(trace)
    check_nesting(trace)
    assert [s["args"]["tokens"] for s in trace.lanes[0, "steps"]] == [8, 8, 8, 1, 1, 1, 1, 1]
    for rank in range(world_size):
        waits = [s for s in trace.lanes[rank, "compute"] if s["name"] == "wait disk"]
        reads = trace.lanes[rank, "disk"]
        if window:
            # Every block of every step comes from disk, but two of no use and those after them.
            assert len(waits) >= 6 * 8 - 4
            assert len(reads) >= 6 * 8
        else:
            assert len(reads) == len({read["name"] for read in reads})
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.usefixtures("warm_workers")
def test_trace_of_three_processes(
    model: Path, store: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(model), "--store", str(store), "--threads", "1"]
    arguments += ["--json", "--local", "3", "--window", "3", "--quiet", "--trace", str(file)]
    code = main([*arguments, "--prompt", "Hello", "--max-tokens", "8"])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    trace = Trace(file)
    check_whole(trace, 3, decoded=7)
    check_causality(trace)
    check_nesting(trace)
    answer = json.loads(printed.out)
    assert [rank["peer"] for rank in trace.ranks] == [r["peer_id"] for r in answer["ranks"]]
    assert trace.ranks[0]["clock_uncertainty_ms"] == 0
    assert all(rank["clock_uncertainty_ms"] > 0 for rank in trace.ranks[1:])
    steps = [token["step"] for token in answer["decoded"]]
    assert steps == [n for n, step in trace.steps(0).items() if step["name"] == "decode"]


class Rewriting:
    """A channel that changes what it sends."""

    def __init__(self, inner: Channel, rewrite: Callable[[Frame], Frame]):
        self._inner = inner
        self._rewrite = rewrite

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._inner, name, value)

    async def send(self, frame: Frame) -> None:
        await self._inner.send(self._rewrite(frame))


def rewriting(rewrite: Callable[[Frame], Frame], rank: int) -> ChannelHook:
    """Change what is sent on one rank's session."""

    def hook(at: int, channel: Channel) -> Channel:
        return Rewriting(channel, rewrite) if at == rank else channel  # type: ignore[return-value]

    return hook


def replaced(frame: Frame, body: object, payload: memoryview | bytes) -> Frame:
    """The same reply with another content."""
    header, message = frame.header, encode(body)
    return Frame.of(header.kind, message, payload, seq=header.seq)


def with_foreign_clock(frame: Frame) -> Frame:
    """As if the sender's clock had another zero and ran 10 % fast."""
    pack, unpack = Lane.RECORD.pack, Lane.RECORD.iter_unpack

    def shown(now_ns: int) -> int:
        return 10**15 + now_ns + now_ns // 10

    match frame_kind(frame):
        case "Clock":
            clock = decode(frame.message, "test")
            return replaced(frame, Clock(shown(clock.now_ns)), b"")
        case "Trace":
            records = (pack(shown(b), shown(e), *more) for b, e, *more in unpack(frame.payload))
            return replaced(frame, decode(frame.message, "test"), b"".join(records))
    return frame


async def test_clocks_of_other_machines_are_aligned(model: Path, store: Path, file: Path) -> None:
    foreign = rewriting(with_foreign_clock, 2)
    async with memory_engine(model, 3, store=store, trace=file, worker_side=foreign) as engine:
        await engine.complete(PROMPT, PARAMS)
    trace = Trace(file)
    check_whole(trace, 3, decoded=5)
    check_causality(trace)
    assert trace.ranks[1]["clock_offset_ms"] == 0
    assert trace.ranks[2]["clock_offset_ms"] > 10**9
    assert trace.ranks[2]["clock_drift_ppm"] > 10_000
    # All ranks' first blocks of a step are computed at the same time.
    for step, span in trace.steps(2).items():
        other = trace.steps(1)[step]
        assert span["ts"] < end(other)
        assert other["ts"] < end(span)


async def test_no_trace_and_no_message_of_one_unless_asked_for(
    model: Path, store: Path, tmp_path: Path
) -> None:
    kinds: set[str] = set()

    def watch(frame: Frame) -> Frame:
        kinds.add(frame_kind(frame))
        if frame_kind(frame) == "Setup":
            setup = decode(frame.message, "test")
            assert isinstance(setup, Setup)
            assert setup.trace_spans == 0
        return frame

    async with memory_engine(model, 2, store=store, master_side=rewriting(watch, 1)) as engine:
        await engine.complete(PROMPT, PARAMS)
    assert kinds == {"Setup", "Probe", "StatsRequest", "step", "partial"}
    assert list(tmp_path.iterdir()) == []


async def test_full_lanes_stop_and_the_trace_says_so(
    model: Path, store: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpirt.engine.connect.TRACE_SPANS", 30)
    async with memory_engine(model, 2, store=store, trace=file) as engine:
        answer = await engine.complete(PROMPT, PARAMS)
    assert len(answer.token_ids) == 6
    trace = Trace(file)
    assert max(map(len, trace.lanes.values())) == 30
    for rank in trace.ranks:
        assert rank["not_recorded"].keys() >= {"compute", "network"}
    full = [i for i in trace.instants if i["name"].startswith("full: ")]
    assert len(full) == sum(len(rank["not_recorded"]) for rank in trace.ranks)


@pytest.mark.usefixtures("micro_batched")
@pytest.mark.parametrize("window", [None, 2])
async def test_overlapping_collectives_are_drawn_apart_and_counted_once(
    model: Path, store: Path, file: Path, window: int | None
) -> None:
    """A prompt goes through the layers as two micro-batches, whose collectives overlap."""
    async with memory_engine(model, 2, store=store, trace=file, window=window) as engine:
        answer = await engine.complete(PROMPT, PARAMS)
    for rank in answer.ranks:
        for step in rank.steps:
            assert step.compute_ms + step.io_ms + step.comm_ms <= step.total_ms
            assert min(step.compute_ms, step.comm_ms) > 0
    trace = Trace(file)
    check_nesting(trace)
    for rank in range(2):
        prompt, *decoded = trace.meetings(rank).values()
        kinds = [span["name"] for span in prompt]
        assert kinds.count("broadcast") == 2
        assert kinds.count("all_reduce") == 4 + 5  # of the first half, no result is wanted
        assert {span["tid"] for spans in decoded for span in spans} == {prompt[0]["tid"]}
    first, second = (s for s in trace.lanes[1, "network"] if s["name"] == "broadcast")
    assert first["ts"] < end(second)  # the worker waits for both halves' rows
    assert second["ts"] < end(first)
    assert {trace.threads[1, span["tid"]] for span in (first, second)} == {"network", "network 2"}


async def test_several_requests_are_one_trace(model: Path, store: Path, file: Path) -> None:
    async with memory_engine(model, 2, store=store, trace=file) as engine:
        for _ in range(2):
            await engine.complete(PROMPT, PARAMS)
        await engine.logits(PROMPT)
    names = [step["name"] for step in Trace(file).lanes[0, "steps"]]
    assert names == (["prefill"] + ["decode"] * 5) * 2 + ["prefill"]


async def test_figures_of_steps_add_up(model: Path, store: Path) -> None:
    async with memory_engine(model, 3, store=store, chunk_tokens=8, window=2) as engine:
        for _ in range(2):  # an answer's figures are of its own request
            engine.reset()
            answer = await engine.complete(PROMPT, PARAMS)
    numbers = [step.step for step in answer.ranks[0].steps]
    assert len(numbers) == 8
    for rank in answer.ranks:
        assert [step.step for step in rank.steps] == numbers
        assert [step.tokens for step in rank.steps] == [8, 8, 8, 1, 1, 1, 1, 1]
        assert [step.prefill for step in rank.steps] == [True] * 3 + [False] * 5
        for cause in ("compute_ms", "io_ms", "comm_ms"):
            total = sum(getattr(step, cause) for step in rank.steps)
            assert total == pytest.approx(getattr(rank, cause))
            assert total > 0
        for step in rank.steps:
            assert step.compute_ms + step.io_ms + step.comm_ms <= step.total_ms
        assert any(step.head_compute_ms for step in rank.steps) == (rank.rank == 0)
        assert rank.read_ms > 0
    assert [token.step for token in answer.decoded] == numbers[3:]
    for token in answer.decoded:
        parts = token.compute_ms + token.io_ms + token.comm_ms + token.other_ms
        assert parts == pytest.approx(token.total_ms)


# -- when something goes wrong ---------------------------------------------------------------


async def test_trace_of_a_request_that_lost_a_peer(
    model: Path, store: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(needed: Sequence[PeerClient], *_: object) -> dict[PeerClient, Answer]:
        return {peer: PeerUnreachableError("nothing listens there") for peer in needed}

    allow_one_plan(monkeypatch)

    def faulty(rank: int, channel: Channel) -> Channel:
        if rank != 2:
            return channel
        return FaultyChannel(channel, Fault.DROP, after=20, kind="partial")

    async with memory_engine(
        model, 3, store=store, trace=file, timeout_s=5, worker_side=faulty
    ) as engine:
        monkeypatch.setattr(connection, "reach", nobody)
        with pytest.raises(PeerLostError):
            await engine.complete(PROMPT, PARAMS)
    trace = Trace(file)
    assert [bool(rank["missing"]) for rank in trace.ranks] == [False, False, True]
    assert "memory:2" in trace.ranks[2]["missing"]
    assert trace.processes[2].endswith("(missing)")
    assert len(trace.steps(0)) == len(trace.steps(1)) == 4  # the last one failed


def lying(change: Callable[[TraceReply], TraceReply], payload: bytes | None = None) -> ChannelHook:
    """Have rank 1 send invalid traces."""

    def lie(frame: Frame) -> Frame:
        if frame_kind(frame) != "Trace":
            return frame
        trace = change(decode(frame.message, "test"))
        return replaced(frame, trace, frame.payload if payload is None else payload)

    return rewriting(lie, 1)


@pytest.mark.parametrize(
    "lie",
    [
        lying(lambda trace: replace(trace, lane="kitchen")),
        lying(lambda trace: replace(trace, lane="disk")),
        lying(lambda trace: replace(trace, names=())),
        lying(lambda trace: trace, b"x" * 31),
        lying(lambda trace: trace, b"\1" + b"\0" * 31),  # ends before it begins
    ],
    ids=["lane", "twice", "names", "size", "times"],
)
async def test_invalid_trace_is_refused(
    model: Path, store: Path, file: Path, lie: ChannelHook
) -> None:
    async with memory_engine(model, 2, store=store, trace=file, worker_side=lie) as engine:
        await engine.complete(PROMPT, PARAMS)
    trace = Trace(file)
    assert "expected the trace of lane" in trace.ranks[1]["missing"]
    assert "memory:1" in trace.ranks[1]["missing"]
    assert trace.lanes[0, "compute"]
    assert not any(rank == 1 for rank, _ in trace.lanes)


def test_stopped_by_ctrl_c(model: Path, tmp_path: Path, file: Path) -> None:
    """The answer ends, the workers are asked what they did, and the file is whole."""
    command = ["generate", "--model", str(model), "--store", str(tmp_path / "store")]
    command += ["--threads", "1", "--quiet", "--trace", str(file)]
    with (
        PeerProcess(tmp_path / "peer") as peer,
        killed_at_exit(
            start_cli(
                *(*command, "--peers", peer.address, "--prompt", "Hello", "--max-tokens", "400")
            )
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "tpirt: interrupted\n")
    trace = Trace(file)
    assert [rank["missing"] for rank in trace.ranks] == ["", ""]
    assert all(trace.steps(rank) for rank in (0, 1))
    check_causality_of_whole_steps(trace)


def check_causality_of_whole_steps(trace: Trace) -> None:
    """As :func:`check_causality`, without the step that was given up."""
    last = max(trace.steps(0))
    for rank in range(len(trace.ranks)):
        spans = trace.lanes[rank, "network"]
        spans[:] = [span for span in spans if span["args"]["step"] < last]
    check_causality(trace)


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
@pytest.mark.parametrize("where", ["folder", "nowhere", "device", "empty"])
def test_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, where: str
) -> None:
    place = {
        "folder": str(tmp_path),
        "nowhere": str(tmp_path / "no" / "such" / "trace.json"),
        "device": os.devnull,
        "empty": "",
    }[where]
    text = tmp_path / "text"
    text.write_text("Hello")
    about = ("--text", str(text)) if command == "eval" else ("--prompt", "Hello")
    options = ("--model", str(model), "--store", str(tmp_path / "store"), "--trace", place)
    assert main([command, *options, *about]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tpirt: error: trace ")
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [text]


async def test_what_was_there_stays_until_the_trace_is_whole(
    store: Path, file: Path, tmp_path: Path
) -> None:
    file.write_text("mine")
    with pytest.raises(CheckpointError):
        async with Engine.connect(tmp_path / "no model", EngineOptions(store=store, trace=file)):
            pass
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


async def test_place_that_went_away_is_told_of_after_other_errors(
    model: Path, store: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gone" / "trace.json"
    file.parent.mkdir()
    with pytest.raises(RequestError, match=r"trace .*cannot be written"):
        async with memory_engine(model, store=store, trace=file):
            shutil.rmtree(file.parent)
    file.parent.mkdir()

    async def fail() -> None:
        async with memory_engine(model, store=store, trace=file):
            shutil.rmtree(file.parent)
            raise KeyError

    with pytest.raises(KeyError):
        await fail()


async def test_link_is_followed(model: Path, store: Path, file: Path) -> None:
    target = file.with_name("target.json")
    file.symlink_to(target)
    async with memory_engine(model, store=store, trace=file) as engine:
        await engine.complete(PROMPT, PARAMS)
    assert file.is_symlink()
    assert Trace(target).lanes[0, "steps"]


def test_chat_and_eval_are_traced(model: Path, store: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Hello world, how are you?")
    options = ("--model", str(model), "--store", str(store), "--threads", "1", "--quiet")
    for command, about, decoded in (
        ("chat", ("--prompt", "Hi", "--max-tokens", "4"), 3),
        ("eval", ("--text", str(text)), 0),
    ):
        file = tmp_path / f"{command}.json"
        assert main([command, *options, *about, "--trace", str(file)]) == 0
        names = [step["name"] for step in Trace(file).lanes[0, "steps"]]
        assert names == ["prefill"] + ["decode"] * decoded
