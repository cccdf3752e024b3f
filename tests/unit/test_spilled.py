"""Which sequences are on disk, and what their files are."""

from __future__ import annotations

import argparse
import asyncio
import threading
from pathlib import Path

import pytest
import torch

from tpirt.cli.options import add_engine_options
from tpirt.cluster import spill_disk
from tpirt.cluster.spill_disk import SpillDisk
from tpirt.engine.slots import Sharing
from tpirt.engine.spilling import Spilled, SpilledSequences
from tpirt.engine.step_costs import StepCosts
from tpirt.errors import StoreError
from tpirt.model.kv_files import KVFiles
from tpirt.model.kv_store import Cached, KVLayout
from tpirt.weights.store import SliceStore

TEXT = list(range(100))


def listed(
    *texts: list[int], most_tokens: int = 1000, trained: int | None = None
) -> SpilledSequences:
    spilled = SpilledSequences(most_tokens, Sharing(trained))
    for handle, ids in enumerate(texts, start=1):
        spilled.add(Spilled(handle, ids, len(ids), float(handle)))
    return spilled


def test_the_one_that_shares_most_is_found() -> None:
    spilled = listed(TEXT[:50], TEXT, [7, 8, 9])
    found = spilled.find([*TEXT, 5, 6], 102)
    assert found is not None
    assert (found[0].handle, found[1]) == (2, 100)
    assert spilled.find([5, 6], 2) is None


def test_one_that_would_lose_more_than_it_shares_stays_on_disk() -> None:
    assert listed(TEXT).find([*TEXT[:49], 500, 501], 51) is None
    assert listed(TEXT).find([*TEXT[:50], 500, 501], 52) is not None


def test_dynamically_rotated_keys_are_found_up_to_the_trained_length() -> None:
    spilled = listed(TEXT[:50], trained=64)
    assert spilled.find(TEXT[:64], 64) is not None
    assert spilled.find(TEXT[:65], 65) is None


def test_the_oldest_make_room() -> None:
    spilled = listed([9] * 60, TEXT[:50], most_tokens=200)
    assert spilled.in_the_way([8] * 50) == []
    assert spilled.in_the_way([8] * 100) == [1]
    assert spilled.in_the_way([*TEXT, *TEXT]) == [1, 2]
    assert not spilled.takes(TEXT * 3)
    assert not spilled.takes(TEXT[:5])


@pytest.mark.parametrize("tokens", [50, 100, 101])
def test_a_prefix_is_of_no_more_use_if_the_longer_one_is_found_instead(tokens: int) -> None:
    longer = [*TEXT, 7][:tokens]
    superseded = listed([9] * 60, TEXT[:50]).superseded(longer) == [2]
    assert superseded == (listed(longer).find([*TEXT[:50], 500], 51) is not None)
    assert superseded == (tokens <= 100)


def test_the_overdue_are_told() -> None:
    spilled = listed(TEXT, [1], [2])
    assert (spilled.until_s, spilled.overdue(0.5), spilled.overdue(2.0)) == (1.0, [], [1, 2])
    spilled.remove([1, 2, 3, 4])
    assert (spilled.until_s, spilled.overdue(9.0), spilled.tokens) == (None, [], 0)


def test_a_prompt_costs_its_chunks() -> None:
    costs = StepCosts()
    assert costs.prompt_seconds(5, 4) is None
    costs.learn(1, 1.0)
    costs.learn(4, 2.0)
    assert costs.prompt_seconds(9, 4) == 5.0
    assert costs.prompt_seconds(8, 4) == 4.0


# -- files -----------------------------------------------------------------------------------


def layers(bits: int | None, tokens: int, seed: int) -> list[Cached]:
    """Random positions in buffers that have room for more."""
    made = [KVLayout(2, 8, torch.bfloat16, bits).allocate(64) for _ in range(3)]
    generator = torch.Generator().manual_seed(seed)
    for layer in made:
        for tensor in layer.tensors:
            tensor.copy_(torch.randint(-99, 99, tensor.shape, generator=generator))
    return [layer.positions(0, tokens) for layer in made]


@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_read_is_what_was_written(tmp_path: Path, bits: int | None) -> None:
    files, first, second = KVFiles(SliceStore(tmp_path)), layers(bits, 5, 1), layers(bits, 7, 2)
    files.write(11, first)
    files.write(12, second)
    for handle, written in ((12, second), (11, first)):
        read = layers(bits, files.tokens(handle), 3)
        files.read(handle, read)
        for mine, theirs in zip(read, written, strict=True):
            for one, other in zip(mine.tensors, theirs.tensors, strict=True):
                assert torch.equal(one, other)
    files.drop([11, 77])
    with pytest.raises(StoreError, match="nothing is stored under handle b"):
        files.read(11, first)
    files.close()
    assert list((tmp_path / "kv").iterdir()) == []


def test_the_limit_of_the_store_is_kept(tmp_path: Path) -> None:
    files = KVFiles(SliceStore(tmp_path, limit_bytes=1 << 10))
    files.write(1, layers(None, 5, 1))  # 960 bytes
    with pytest.raises(StoreError, match=r"needs 960 B, and .* of the store.s limit of 1 KiB"):
        files.write(2, layers(None, 5, 1))
    files.close()


async def test_a_disk_that_recovers_after_the_session_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer lives on: what its sessions leave would stay locked."""
    recovers, closed = threading.Event(), threading.Event()

    class Files(KVFiles):
        def close(self) -> None:
            super().close()
            closed.set()

    monkeypatch.setattr(spill_disk, "KVFiles", Files)
    monkeypatch.setattr(KVFiles, "read", lambda *_: recovers.wait(20))
    disk = SpillDisk(SliceStore(tmp_path))
    await disk.write(1, layers(None, 5, 1))
    monkeypatch.setattr(spill_disk, "SPILL_TIMEOUT_S", 0.05)
    with pytest.raises(StoreError, match="has not answered"):
        await disk.read(1, layers(None, 5, 1))
    await disk.aclose()
    assert list((tmp_path / "kv").iterdir()) != []
    recovers.set()
    assert await asyncio.to_thread(closed.wait, 20)
    assert list((tmp_path / "kv").iterdir()) == []


# -- the option ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "spill_bytes"),
    [((), 4 << 30), (("--spill", "900M"), 900 << 20), (("--spill", "none"), 0)],
)
def test_the_option_bounds_it(words: tuple[str, ...], spill_bytes: int) -> None:
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    assert parser.parse_args(words).spill == spill_bytes
