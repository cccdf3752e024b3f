"""Traces drawn: what tokens waited for is exact, the picture is there, bad input is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.timeline import choose_view, last_tokens, main
from bench.trace.critical_path import (
    COMPUTING,
    DISK_WAIT,
    NETWORK_WAIT,
    OTHER,
    critical_path,
    shares,
)
from bench.trace.reader import Rank, Span, Trace, read_trace
from tpirt.errors import RequestError
from tpirt.stopwatch import LANES
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams


def rank(number: int, **lanes: list[tuple[str, float, float]]) -> Rank:
    """A rank with one step, 1, whose spans are given as name, begin and end."""
    found = Rank(number, f"peer{number}", "", 0.0)
    for lane, spans in lanes.items():
        found.lanes[lane] = [Span(name, begin, end, 1) for name, begin, end in spans]
    return found


def pieces(*ranks: Rank) -> list[tuple[float, float, str, int]]:
    trace = Trace("tiny", ranks)
    path = critical_path(trace, trace.steps)
    return [(p.begin_ms, p.end_ms, p.cause, p.rank) for p in path]


def test_path_of_one_rank_is_what_it_did() -> None:
    only = rank(
        0,
        steps=[("decode", 0, 10)],
        compute=[("wait disk", 1, 4), ("layers.0.mlp", 4, 7), ("sample", 9, 10)],
        network=[("reduce", 8, 8)],
    )
    assert pieces(only) == [
        (0, 1, OTHER, 0),
        (1, 4, DISK_WAIT, 0),
        (4, 7, COMPUTING, 0),
        (7, 8, OTHER, 0),
        (8, 9, OTHER, 0),
        (9, 10, COMPUTING, 0),
    ]


def test_path_leads_over_the_rank_that_came_last() -> None:
    master = rank(
        0,
        steps=[("decode", 0, 20)],
        compute=[("layers.0.attention", 1, 3), ("layers.0.mlp", 9, 12), ("lm_head.0", 15, 20)],
        network=[("send step", 0, 1), ("all_reduce", 3, 9), ("reduce", 12, 15)],
    )
    worker = rank(
        1,
        steps=[("decode", 2, 14)],
        compute=[("wait disk", 2, 6), ("layers.0.attention", 6, 7), ("layers.0.mlp", 10, 11)],
        network=[("all_reduce", 7, 10), ("reduce", 11, 14)],
    )
    assert pieces(master, worker) == [
        (0, 2, NETWORK_WAIT, 1),  # until the worker knew of the step
        (2, 6, DISK_WAIT, 1),
        (6, 7, COMPUTING, 1),
        (7, 9, NETWORK_WAIT, 0),  # its part on the way, until the master had the sum
        (9, 12, COMPUTING, 0),
        (12, 15, NETWORK_WAIT, 0),
        (15, 20, COMPUTING, 0),
    ]


def test_path_of_micro_batches_leads_over_compute_while_sums_are_under_way() -> None:
    master = rank(
        0,
        steps=[("prefill", 0, 30)],
        compute=[("attention", 1, 3), ("attention", 3, 6), ("mlp", 9, 12), ("mlp", 14, 17)],
        network=[
            ("send step", 0, 1),
            ("all_reduce", 3, 9),  # of the first half
            ("all_reduce", 6, 14),  # of the second
            ("reduce", 17, 20),
        ],
    )
    worker = rank(
        1,
        steps=[("prefill", 1, 18)],
        compute=[("attention", 1, 2), ("attention", 2, 4), ("mlp", 10, 11), ("mlp", 11, 16)],
        network=[("all_reduce", 2, 10), ("all_reduce", 4, 11), ("reduce", 16, 18)],
    )
    assert pieces(master, worker) == [
        (0, 1, NETWORK_WAIT, 0),
        (1, 3, COMPUTING, 0),
        (3, 6, COMPUTING, 0),
        (6, 9, NETWORK_WAIT, 0),
        (9, 12, COMPUTING, 0),
        (12, 14, NETWORK_WAIT, 0),
        (14, 17, COMPUTING, 0),
        (17, 20, NETWORK_WAIT, 0),
        (20, 30, OTHER, 0),
    ]


def test_path_goes_on_over_what_lies_between_steps_and_has_no_gap() -> None:
    steps = [Span("decode", 0, 4, 1), Span("decode", 6, 9, 2)]
    only = Rank(0, "master", "", 0.0)
    only.lanes["steps"] = steps
    only.lanes["compute"] = [Span("a", 0, 4), Span("a", 6, 9)]
    path = critical_path(Trace("tiny", [only]), steps)
    assert [(p.begin_ms, p.end_ms, p.cause) for p in path] == [
        (0, 4, COMPUTING),
        (4, 6, OTHER),
        (6, 9, COMPUTING),
    ]
    spent = shares(path)
    assert sum(spent.values()) == pytest.approx(1)
    assert spent[COMPUTING] == pytest.approx(7 / 9)
    assert set(shares([]).values()) == {0.0}


def test_rank_without_a_trace_is_left_out() -> None:
    master = rank(0, steps=[("decode", 0, 2)], compute=[("a", 0, 2)])
    assert pieces(master, Rank(1, "pi", "gone", 0.0)) == [(0, 2, COMPUTING, 0)]


def test_last_tokens_are_of_the_last_answer() -> None:
    names = ["prefill", "decode", "decode", "prefill", "decode", "decode", "decode"]
    steps = [Span(name, at, at + 1, at) for at, name in enumerate(names)]
    only = Rank(0, "master", "", 0.0)
    for count, expected in ((2, [5, 6]), (5, [4, 5, 6])):
        only.lanes["steps"] = steps
        assert [s.number for s in last_tokens(Trace("tiny", [only]), count)] == expected
    only.lanes["steps"] = steps[:4]
    assert [s.number for s in last_tokens(Trace("tiny", [only]), 9)] == [3]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Makes traces of tiny answers."""
    model = make_model(tmp_path_factory.mktemp("models") / "tiny")
    folder = tmp_path_factory.mktemp("traces")

    def trace(world_size: int) -> Path:
        import asyncio

        file = folder / f"{world_size}.json"

        async def run() -> None:
            async with memory_engine(
                model, world_size, window=2, store=folder / "store", trace=file
            ) as engine:
                await engine.complete([1, 2, 3, 4], SamplingParams(max_tokens=5))

        if not file.exists():
            asyncio.run(run())
        return file

    return trace


@pytest.mark.parametrize("world_size", [1, 3])
def test_shares_of_a_real_answer(make: Callable[[int], Path], world_size: int) -> None:
    trace = read_trace(make(world_size))
    view = choose_view(trace, None, None, 2)
    assert [step.name for step in view.steps] == ["decode", "decode"]
    assert view.path[0].begin_ms == view.begin_ms
    assert view.path[-1].end_ms == view.end_ms
    for earlier, later in zip(view.path, view.path[1:], strict=False):
        assert earlier.end_ms == later.begin_ms
    spent = shares(view.path)
    assert sum(spent.values()) == pytest.approx(1)
    assert spent[COMPUTING] > 0
    if world_size > 1:
        assert spent[NETWORK_WAIT] > 0


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    "options", [(), ("--tokens", "1"), ("--from", "0"), ("--to", "100")], ids=" ".join
)
def test_picture_is_drawn(
    make: Callable[[int], Path], tmp_path: Path, world_size: int, options: tuple[str, ...]
) -> None:
    out = tmp_path / "picture.png"
    assert main([str(make(world_size)), "--out", str(out), *options]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def events(**changes: Any) -> str:
    fact = {"rank": 0, "peer": "master", "missing": "", "clock_uncertainty_ms": 0}
    step = {"ph": "X", "pid": 0, "cat": "steps", "name": "decode", "ts": 0, "dur": 1, "args": {}}
    content: dict[str, Any] = {
        "otherData": {"tool": "tpirt 1", "model": "m", "ranks": [fact]},
        "traceEvents": [step],
    }
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("", "not JSON"),
        ('{"traceEvents": [', "not JSON"),
        ("[]", "not a trace of tpirt's"),
        ('{"traceEvents": []}', "not a trace of tpirt's"),
        (events(otherData={"tool": "another", "ranks": []}), "not a trace of tpirt's"),
        (events(traceEvents=[{"ph": "X"}]), "not a trace of tpirt's"),
        (events(traceEvents=7), "not a trace of tpirt's"),
        (events(traceEvents=[]), "an empty trace"),
    ],
)
def test_what_is_no_trace_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, reason: str
) -> None:
    file = tmp_path / "trace.json"
    if content is not None:
        file.write_text(content)
    assert main([str(file)]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1
    assert not Path(f"{file}.png").exists()


def test_smallest_trace_is_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    file.write_text(events())
    trace = read_trace(file)
    assert set(trace.ranks[0].lanes) == set(LANES)
    assert len(trace.steps) == 1


def test_times_beyond_the_trace_are_refused(make: Callable[[int], Path]) -> None:
    trace = read_trace(make(1))
    for begin, end in ((1e6, None), (0.2, 0.1), (None, -1.0)):
        with pytest.raises(RequestError, match="nothing was recorded there"):
            choose_view(trace, begin, end, 3)


def test_picture_that_cannot_be_written_is_refused(
    make: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(make(1)), "--out", str(tmp_path / "no" / "picture.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_missing_matplotlib_is_named(
    make: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(make(1))]) == 2
    assert "needs matplotlib" in capsys.readouterr().err
