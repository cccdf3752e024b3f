"""Conversations that memory is too short for go to disk, and come back; whatever the disk does."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.nightly import nightly
from tpirt.cluster import spill_disk
from tpirt.cluster.group import Group
from tpirt.engine import Engine, spilling
from tpirt.engine.step_costs import StepCosts
from tpirt.errors import PeerLostError
from tpirt.model import kv_files
from tpirt.model.kv_files import KVFiles
from tpirt.planning import Deployment
from tpirt.testing.cluster import memory_engine
from tpirt.types import SamplingParams

PARAMS = SamplingParams(max_tokens=5)
TEXTS = [[(first + 7 * i) % 250 + 3 for i in range(70)] for first in (3, 90)]
WORD = [41, 17, 5]


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for what no request uses, and computing takes for ever."""
    monkeypatch.setattr(Deployment, "has_room", lambda *_, displacing: displacing)
    monkeypatch.setattr(StepCosts, "prompt_seconds", lambda *_: float("inf"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


async def talk(engine: Engine, turns: int = 3) -> list[list[int]]:
    """Two conversations, turn by turn: their texts at the end."""
    texts = [list(text) for text in TEXTS]
    for _ in range(turns):
        for text in texts:
            text += (await engine.complete(text, PARAMS)).token_ids + WORD
    return texts


async def plain(model: Path, **options: object) -> list[list[int]]:
    """The same with memory for both conversations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deployment, "has_room", lambda *_, displacing: True)
        async with memory_engine(model, **options) as engine:  # type: ignore[arg-type]
            texts = await talk(engine)
            assert "2 kept in memory, 0 on disk (0 B a rank); so far 0 " in engine.explain_cache()
            return texts


def files(store: Path) -> list[Path]:
    """What is on disk, of all sessions."""
    return [path for path in (store / "kv").glob(".partial-*/*") if path.is_file()]


def so_far(engine: Engine) -> dict[str, int]:
    """What an engine says that became of conversations."""
    parts = engine.explain_cache().partition("so far ")[2].split(", ")
    return {words: int(count) for count, _, words in (part.partition(" ") for part in parts)}


@pytest.mark.parametrize("window", [nightly(None), 2])
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("world_size", [nightly(1), 3])
async def test_tokens_are_those_without_spilling(
    model: Path, store: Path, crowded: None, world_size: int, kv: str, window: int | None
) -> None:
    expected = await plain(model, world_size=world_size, kv=kv, window=window, store=store)
    async with memory_engine(model, world_size, kv=kv, window=window, store=store) as engine:
        assert await talk(engine) == expected
        assert so_far(engine) == {"spilled": 5, "restored": 4, "computed again": 0, "dropped": 0}
        assert len(files(store)) == world_size
        for file in files(store):
            assert file.stat().st_mode & 0o777 == 0o600
    assert list((store / "kv").iterdir()) == []


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def delete_the_folder(file: Path) -> None:
    """Of all sessions, as who tidies a store by hand."""
    shutil.rmtree(file.parent.parent)


@pytest.mark.parametrize("damage", [change_a_byte, shorten, Path.unlink, delete_the_folder])
@pytest.mark.parametrize("world_size", [nightly(1), 3])
async def test_what_cannot_be_read_is_computed_again(
    model: Path, store: Path, crowded: None, world_size: int, damage: Callable[[Path], None]
) -> None:
    """Also if it is one rank's file only."""
    expected = await plain(model, world_size=world_size, store=store)
    async with memory_engine(model, world_size, store=store) as engine:
        texts = await talk(engine, turns=1)
        damage(files(store)[-1])
        for text, whole in zip(texts, expected, strict=True):
            text += (await engine.complete(text, PARAMS)).token_ids
            assert text == whole[: len(text)]
        assert so_far(engine)["computed again"] == 1
        assert len(files(store)) == world_size


@pytest.mark.parametrize("world_size", [1, 3])
async def test_a_full_disk_costs_time_only(
    model: Path, store: Path, crowded: None, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is one rank's disk only."""
    expected = await plain(model, world_size=world_size, store=store)
    opener, opened = kv_files._private, []

    def full(path: str, flags: int) -> int:
        opened.append(path)
        if len(opened) % world_size == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opener(path, flags)

    monkeypatch.setattr(kv_files, "_private", full)
    async with memory_engine(model, world_size, store=store) as engine:
        assert await talk(engine) == expected
        assert so_far(engine) == {"spilled": 0, "restored": 0, "computed again": 0, "dropped": 5}
        assert files(store) == []


async def test_nothing_is_spilled_where_it_is_not_wanted(
    model: Path, store: Path, crowded: None
) -> None:
    async with memory_engine(model, store=store, spill_bytes=0) as engine:
        await talk(engine)
        assert so_far(engine) == {"spilled": 0, "restored": 0, "computed again": 0, "dropped": 5}
    assert not (store / "kv").exists()


async def test_computing_is_preferred_where_it_is_quicker(
    model: Path, store: Path, crowded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCosts, "prompt_seconds", lambda *_: 0.0)
    async with memory_engine(model, store=store) as engine:
        await talk(engine)
        assert so_far(engine) == {"spilled": 5, "restored": 0, "computed again": 4, "dropped": 0}
        assert len(files(store)) == 2  # of each conversation the longest


async def test_sessions_on_one_store_keep_apart(model: Path, store: Path, crowded: None) -> None:
    """One that ends, or begins, leaves another's files alone, and removes those of killed ones."""
    expected = await plain(model, store=store)
    async with memory_engine(model, store=store) as engine:
        texts = await talk(engine, turns=1)
        killed = store / "kv" / ".partial-session-1234"
        killed.mkdir()
        (killed / "5678").touch()
        (store / "kv" / ".lock-session-1234").touch()
        async with memory_engine(model, store=store) as other:
            assert not killed.exists()
            await talk(other, turns=1)
            assert len(files(store)) == 2
        assert len(files(store)) == 1
        for text, whole in zip(texts, expected, strict=True):
            text += (await engine.complete(text, PARAMS)).token_ids
            assert text == whole[: len(text)]
        assert so_far(engine)["restored"] == 2
    assert list((store / "kv").iterdir()) == []


async def test_reset_forgets_what_is_on_disk(model: Path, store: Path, crowded: None) -> None:
    async with memory_engine(model, 2, store=store) as engine:
        await talk(engine, turns=1)
        assert len(files(store)) == 2
        engine.reset()
        await engine.complete([7], PARAMS)
        assert files(store) == []
        assert "0 on disk" in engine.explain_cache()


async def test_what_is_old_is_deleted(
    model: Path, store: Path, crowded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a request that comes along."""
    drop, dropped = Group.drop_spilled, asyncio.Event()

    async def noted(self: Group, handles: Sequence[int]) -> None:
        await drop(self, handles)
        dropped.set()

    monkeypatch.setattr(Group, "drop_spilled", noted)
    monkeypatch.setattr(spilling, "LIFE_S", 0.05)
    monkeypatch.setattr(spilling, "_LATE_S", 0.01)
    async with memory_engine(model, 2, store=store) as engine:
        await talk(engine, turns=1)
        async with asyncio.timeout(20):
            await dropped.wait()
        assert files(store) == []
        assert "0 on disk" in engine.explain_cache()


async def test_a_lost_peer_takes_what_is_on_disk_with_it(
    model: Path, store: Path, crowded: None
) -> None:
    expected = await plain(model, world_size=2, store=store)
    async with memory_engine(model, 2, store=store) as engine:
        texts = await talk(engine, turns=1)
        (before,) = {file.name for file in files(store)}
        engine._group._all_links()[0].give_up(PeerLostError("gone"))
        for text, whole in zip(texts, expected, strict=True):
            text += (await engine.complete(text, PARAMS)).token_ids
            assert text == whole[: len(text)]
        assert so_far(engine)["restored"] == 0
        assert before not in {file.name for file in files(store)}


async def test_a_reader_may_leave_while_its_conversation_comes_back(
    model: Path, store: Path, crowded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await plain(model, world_size=2, store=store)
    restore, begun, go_on = Group.restore, asyncio.Event(), asyncio.Event()

    async def slow(self: Group, slot: int, handle: int) -> None:
        begun.set()
        await go_on.wait()
        await restore(self, slot, handle)

    monkeypatch.setattr(Group, "restore", slow)
    async with memory_engine(model, 2, store=store) as engine:
        texts = await talk(engine, turns=1)
        leaving = asyncio.create_task(engine.complete(texts[0], PARAMS))
        await begun.wait()
        staying = asyncio.create_task(engine.complete(texts[1], PARAMS))
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        go_on.set()
        answers = [await staying, await engine.complete(texts[0], PARAMS)]
        for text, whole, answer in zip(texts, expected, reversed(answers), strict=True):
            assert answer.token_ids == whole[len(text) :][: PARAMS.max_tokens]
        assert so_far(engine)["restored"] >= 2


async def test_an_engine_may_be_closed_while_it_spills(
    model: Path, store: Path, crowded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun, go_on = KVFiles.write, threading.Event(), threading.Event()

    def slow(self: KVFiles, *arguments: object) -> None:
        begun.set()
        assert go_on.wait(20)
        write(self, *arguments)  # type: ignore[arg-type]

    async def use() -> None:
        async with memory_engine(model, 2, store=store) as engine:
            await talk(engine)

    monkeypatch.setattr(KVFiles, "write", slow)
    task = asyncio.create_task(use())
    assert await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with suppress(asyncio.CancelledError):
        await task
    assert list((store / "kv").iterdir()) == []


@pytest.mark.parametrize("world_size", [1, 2])
async def test_a_disk_that_hangs_holds_nobody_up_for_ever(
    model: Path, store: Path, crowded: None, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence is computed again, the next ones are not spilled, and the engine closes."""
    write, moves, calls = KVFiles.write, threading.Event(), []

    def hang(self: KVFiles, *arguments: object) -> None:
        calls.append(self)
        moves.wait(60)
        write(self, *arguments)  # type: ignore[arg-type]

    expected = await plain(model, world_size=world_size, store=store)
    monkeypatch.setattr(KVFiles, "write", hang)
    monkeypatch.setattr(spill_disk, "SPILL_TIMEOUT_S", 0.1)
    try:
        async with asyncio.timeout(30):
            async with memory_engine(model, world_size, store=store) as engine:
                assert await talk(engine) == expected
                assert so_far(engine)["dropped"] == 5
        assert len(calls) == world_size
    finally:
        moves.set()
