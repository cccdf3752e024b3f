"""The operating system refuses memory, threads or open files: said in one line, and survived."""

from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tpirt.batch import Segment
from tpirt.cli.main import main
from tpirt.engine import Engine
from tpirt.errors import ConfigError, MemoryLimitError
from tpirt.model.decoder import Decoder
from tpirt.model.kv_store import Cached, KVLayout, KVStore
from tpirt.refusals import allow_open_files, refusal
from tpirt.testing.cluster import memory_engine
from tpirt.types import SamplingParams

PROMPT = list(range(10, 30))
PARAMS = SamplingParams(max_tokens=5)
TORCH = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 11796480 bytes. Error code 12 (Cannot allocate memory)"
)
REFUSALS = [
    RuntimeError(TORCH),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
]


def refuse(monkeypatch: pytest.MonkeyPatch, rank: int, name: str, exc: Exception) -> None:
    """Have a method of a rank's decoder raise ``exc``."""
    method = getattr(Decoder, name)

    def refused(decoder: Any, *args: Any) -> Any:
        if decoder._comm.rank == rank:
            raise exc
        return method(decoder, *args)

    monkeypatch.setattr(Decoder, name, refused)


@pytest.mark.parametrize("rank", [0, 1])
async def test_memory_refused_in_a_step_is_named_and_the_group_lives_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    async with memory_engine(model, 2) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
        for exc in REFUSALS:
            with monkeypatch.context() as patched:
                refuse(patched, rank, "_attention", exc)
                with pytest.raises(MemoryLimitError, match=rf"rank {rank}: a step of .*; .*raise"):
                    await engine.complete(PROMPT, PARAMS)
            assert engine.broken is None
        if rank == 0:
            with monkeypatch.context() as patched:
                refuse(patched, rank, "_head", RuntimeError(TORCH))
                with pytest.raises(MemoryLimitError, match=r"rank 0: logits of 1 .* bytes"):
                    await engine.complete(PROMPT, PARAMS)
        engine.reset()
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected


async def test_another_error_in_a_step_is_not_taken_for_a_refusal(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_engine(model) as engine:
        refuse(monkeypatch, 0, "_attention", RuntimeError("shapes do not match"))
        with pytest.raises(RuntimeError, match="shapes"):
            await engine.complete(PROMPT, PARAMS)


def test_kv_store_is_usable_after_memory_was_refused_while_it_shrank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = KVStore(2, KVLayout(1, 4, torch.float32))
    whole = Segment(0, 0, 640, 0, 640)
    store.prepare([whole])
    store.commit([whole])
    allocate, calls = KVLayout.allocate, 0

    def refused(layout: KVLayout, capacity: int) -> Cached:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return allocate(layout, capacity)

    monkeypatch.setattr(KVLayout, "allocate", refused)
    with pytest.raises(MemoryError):
        store.prepare([Segment(0, 0, 1, 0, 1)])
    store.prepare([whole])
    assert {layer.length for layer in store._slots[0].layers} == {640}


def test_memory_refused_to_a_command_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError(TORCH)

    monkeypatch.setattr(Engine, "connect", refused)
    assert main(["generate", "--model", str(model), "--prompt", "hi", "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("tpirt: error: the system refused 11,796,480 bytes of memory")
    assert "output" not in line


# -- open files ------------------------------------------------------------------------------


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft and the hard limit on open files, which are not this process's own."""
    now = [64, 256]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: now.__setitem__(slice(2), new))
    return now


def test_soft_limit_is_raised_to_what_is_needed(limits: list[int]) -> None:
    allow_open_files(60)
    assert limits == [64, 256]
    allow_open_files(200)
    assert limits == [200, 256]


async def test_hard_limit_too_low_for_the_peers_is_named_before_any_is_asked(
    limits: list[int],
) -> None:
    with pytest.raises(ConfigError, match=r"may open 256 files .* `ulimit -n 5\d\d`"):
        async with Engine.connect(peers=[f"pi{n}:1" for n in range(100)]):
            pytest.fail("loaded")


def test_what_is_a_refusal_and_what_is_not() -> None:
    words = refusal(OSError(errno.EMFILE, "Too many open files", "model.safetensors"))
    assert words is not None
    assert "ulimit -n" in words
    assert refusal(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert refusal(ImportError("no module named torch")) is None
    assert refusal(OSError(errno.ENOSPC, "No space left on device")) is None
