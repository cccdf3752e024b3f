"""Keys and values by slot: what each sequence holds, and that memory is given back."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from tpirt.batch import Segment
from tpirt.model import kv_store
from tpirt.model.kv_store import Cached, KVLayout, KVStore
from tpirt.ops.kv_codes import from_codes, round_to_codes

LAYERS, HEADS, DIM = 2, 3, 4
TOKEN_BYTES = {None: 2 * LAYERS * HEADS * DIM * 4, 8: 2 * LAYERS * HEADS * (DIM + 2)}


class Memory(bytearray):
    """What a buffer lies in; its end can be noticed."""


@pytest.fixture(params=[None, 8], ids=["float32", "int8"])
def kv(request: pytest.FixtureRequest) -> KVStore:
    return KVStore(LAYERS, KVLayout(HEADS, DIM, torch.float32, request.param))


@pytest.fixture
def token_bytes(kv: KVStore) -> int:
    return TOKEN_BYTES[kv.layout.bits]


def read(cached: Cached) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all heads, as attention reads them."""
    heads, keys, values = zip(*cached.pieces(torch.float32), strict=True)
    assert heads[0].start in (None, 0)
    return torch.cat(keys), torch.cat(values)


def stored(kv: KVStore, x: torch.Tensor) -> torch.Tensor:
    """What a store makes of rows."""
    return x if kv.layout.bits is None else from_codes(*round_to_codes(x), torch.float32)


def rows(layer: int, start: int, tokens: int, seed: int) -> torch.Tensor:
    """(K, T, D): what a token's keys are depends on its sequence, position and layer."""
    positions = torch.arange(start, start + tokens).float().view(1, -1, 1)
    heads = torch.arange(HEADS).float().view(-1, 1, 1) / 10
    return (positions + heads + 1000 * layer + 10_000 * seed).expand(HEADS, tokens, DIM)


def segment(slot: int, position: int, tokens: int) -> Segment:
    return Segment(slot, position, tokens, 1, position + tokens)


def feed(kv: KVStore, part: Segment, seed: int | None = None) -> None:
    """Run a step of one segment."""
    kv.prepare([part])
    for layer in range(LAYERS):
        new = rows(layer, part.position, part.tokens, part.slot if seed is None else seed)
        kv.append(layer, part, new, -new)
    kv.commit([part])


def held(kv: KVStore, slot: int, layer: int = 1) -> torch.Tensor:
    """All keys of a slot, as the next token's attention sees them; checks the values too."""
    part = segment(slot, kv.length(slot), 1)
    kv.prepare([part])
    nothing = torch.zeros(HEADS, 1, DIM)
    keys, values = read(kv.append(layer, part, nothing, nothing))
    assert torch.equal(keys, -values)
    return keys[:, :-1].clone()


def test_a_sequence_grows_and_keeps_what_it_holds(kv: KVStore) -> None:
    position = 0
    for tokens in (1, 5, 64, 1, 130, 7):
        feed(kv, segment(0, position, tokens))
        position += tokens
        assert kv.length(0) == position
        for layer in range(LAYERS):
            assert torch.equal(held(kv, 0, layer), stored(kv, rows(layer, 0, position, 0)))


def test_slots_are_independent(kv: KVStore) -> None:
    parts = [segment(slot, 0, 10 * (slot + 1)) for slot in range(3)]
    kv.prepare(parts)
    for layer in range(LAYERS):
        for part in parts:
            new = rows(layer, 0, part.tokens, part.slot)
            keys, _ = read(kv.append(layer, part, new, -new))
            assert keys.shape == (HEADS, part.tokens, DIM)
    kv.commit(parts)
    kv.free(1)
    assert [kv.length(slot) for slot in range(4)] == [10, 0, 30, 0]
    assert torch.equal(held(kv, 0), stored(kv, rows(1, 0, 10, 0)))
    assert torch.equal(held(kv, 2), stored(kv, rows(1, 0, 30, 2)))


def test_what_was_not_committed_does_not_count(kv: KVStore) -> None:
    feed(kv, segment(0, 0, 20))
    part = segment(0, 12, 30)
    kv.prepare([part])
    kv.append(0, part, rows(0, 12, 30, 7), rows(0, 12, 30, 7))
    assert kv.length(0) == 12
    assert torch.equal(held(kv, 0), stored(kv, rows(1, 0, 12, 0)))


def test_a_fork_shares_the_prefix_and_diverges(kv: KVStore) -> None:
    feed(kv, segment(0, 0, 50))
    feed(kv, segment(1, 0, 9))
    kv.fork(0, 1, 30)
    assert torch.equal(held(kv, 1), stored(kv, rows(1, 0, 30, 0)))
    feed(kv, segment(0, 30, 8), seed=5)
    feed(kv, segment(1, 30, 8), seed=6)
    assert torch.equal(
        held(kv, 0), stored(kv, torch.cat((rows(1, 0, 30, 0), rows(1, 30, 8, 5)), 1))
    )
    assert torch.equal(
        held(kv, 1), stored(kv, torch.cat((rows(1, 0, 30, 0), rows(1, 30, 8, 6)), 1))
    )
    kv.fork(0, 2, 0)
    assert kv.length(2) == 0


def test_keep_closes_the_gaps_of_a_path(kv: KVStore) -> None:
    feed(kv, segment(0, 0, 40))
    kv.prepare([replace(segment(0, 33, 2), keep=(1, 4, 9))])
    assert kv.length(0) == 33
    kept = torch.cat([rows(1, 0, 30, 0), *(rows(1, at, 1, 0) for at in (31, 34, 39))], 1)
    assert torch.equal(held(kv, 0), stored(kv, kept))


def test_memory_is_given_back(kv: KVStore, token_bytes: int) -> None:
    feed(kv, segment(0, 0, 1000))
    feed(kv, segment(1, 0, 200))
    assert kv.nbytes == (1024 + 256) * token_bytes
    feed(kv, segment(0, 599, 1))  # more than half is still needed
    assert kv.nbytes == (1024 + 256) * token_bytes
    feed(kv, segment(0, 149, 1))
    assert kv.nbytes == (192 + 256) * token_bytes
    assert torch.equal(held(kv, 0), stored(kv, rows(1, 0, 150, 0)))
    kv.free(1)
    kv.free(1)
    assert kv.nbytes == 192 * token_bytes
    feed(kv, segment(0, 0, 3))  # a new conversation
    assert kv.nbytes == 64 * token_bytes
    kv.free(0)
    assert kv.nbytes == 0


def test_growing_by_single_tokens_copies_linearly(kv: KVStore, token_bytes: int) -> None:
    copied, before = 0, 0
    for position in range(5000):
        part = segment(0, position, 1)
        kv.prepare([part])
        kv.commit([part])
        if kv.nbytes != before:
            copied, before = copied + position, kv.nbytes
        assert kv.nbytes <= token_bytes * (position * 5 // 4 + 128)
    assert copied < 5 * 5000


@pytest.mark.parametrize(
    "ends", [[1], [64], [65], [1000, 40], [40, 1000], [5000, 100, 30], [10, 10, 10]]
)
def test_bytes_for_is_the_peak_of_a_step(
    monkeypatch: pytest.MonkeyPatch, kv: KVStore, ends: list[int]
) -> None:
    """Counted from the buffers alive whenever one is made."""
    peak = now = 0

    def gone(nbytes: int) -> None:
        nonlocal now
        now -= nbytes

    def counted(nbytes: int) -> torch.Tensor:
        nonlocal now, peak
        memory = Memory(nbytes + 1)
        weakref.finalize(memory, gone, nbytes)
        now += nbytes
        peak = max(peak, now)
        return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]

    monkeypatch.setattr(kv_store, "page_buffer", counted)
    for slot in range(3):
        feed(kv, segment(slot, 0, 300))
    parts = [segment(slot, 0, end) for slot, end in enumerate(ends)]
    foreseen = kv.bytes_for(parts)
    restored = max(kv.layout.piece_bytes(end) for end in ends)  # while the step runs
    peak = now
    kv.prepare(parts)
    assert max(peak, now + restored) == foreseen
    assert now == kv.nbytes
