"""Another plan of the same model over warm stores: only units that a store lacks are sent."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.nightly import nightly
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.cluster.worker import Worker
from tpirt.config import ModelConfig
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import PeerLostError, PeerUnreachableError, StoreError
from tpirt.ops.quant import QuantSpec
from tpirt.protocol.messages import UnitChunk, decode_call
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.testing.cluster import MemoryPeerClient
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams
from tpirt.units import format_bytes
from tpirt.weights.checkpoint import Checkpoint
from tpirt.weights.manifest import SliceSpec
from tpirt.weights.store import SliceStore

PROMPT = list(range(10, 30))
PARAMS = SamplingParams(max_tokens=6)


class CountingClient(MemoryPeerClient):
    """Counts what is sent; one worker after another may answer with the same store."""

    def __init__(self, store: Path, rank: int):
        super().__init__(Worker(f"rank{rank}", SliceStore(store), None, 1, lambda _: None), rank)
        self.units: set[int] = set()
        self.sent = 0
        self.largest = 0

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        async def counted() -> AsyncIterator[bytes]:
            async for data in chunks:
                chunk = decode_call(UnitChunk, data, "test")
                if not chunk.order:
                    self.units.add(chunk.unit)
                    self.sent += len(chunk.data)
                    self.largest = max(self.largest, len(chunk.data))
                yield data

        return await super().upload(method, counted(), timeout_s)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for several units and MLP blocks per rank."""
    return make_model(
        tmp_path_factory.mktemp("wide") / "model",
        "llama",
        num_attention_heads=6,
        num_key_value_heads=6,
        hidden_size=96,
        intermediate_size=1536,
        attention_bias=True,
    )


@asynccontextmanager
async def connected(
    model: Path, stores: Sequence[Path], **options: Any
) -> AsyncIterator[tuple[Engine, list[CountingClient]]]:
    clients = [CountingClient(store, rank) for rank, store in enumerate(stores) if rank]
    chosen = EngineOptions(
        dtype="float32", threads=1, store=stores[0], collective="star", **options
    )
    async with Engine.connect(model, chosen, peers=clients) as engine:
        yield engine, clients


def slice_spec(
    model: Path, world: int, rank: int, quantize: str, ratio: Sequence[float] | None = None
) -> SliceSpec:
    config = ModelConfig.from_dir(model)
    form = WeightFormat(torch.float32, QuantSpec.parse(quantize))
    with Checkpoint.open(model) as checkpoint:
        return SliceMaker(checkpoint, config, form).spec(
            make_partition(config, world, ratio).shards[rank]
        )


def unit_sizes(
    model: Path, world: int, rank: int, quantize: str, ratio: Sequence[float] | None = None
) -> dict[str, int]:
    spec = slice_spec(model, world, rank, quantize, ratio)
    return {unit.key: spec.unit_bytes(number) for number, (_, unit) in enumerate(spec.places)}


@pytest.mark.parametrize("quantize", ["none", nightly("int8"), nightly("int4")])
async def test_bytes_sent_are_those_of_the_units_lacked(
    wide: Path, tmp_path: Path, quantize: str
) -> None:
    stores = [tmp_path / f"store{rank}" for rank in range(3)]
    held: list[set[str]] = [set() for _ in stores]
    plans: list[tuple[int, dict[str, Any]]] = [
        (2, {}),
        (2, {}),
        (2, {"window": 3}),
        (3, {}),
        (3, {"ratio": [2.0, 1.0, 1.0]}),
        (2, {"ratio": [1.0, 2.0]}),
        (3, {}),
        (2, {}),
    ]
    saved = 0
    for world, options in plans:
        async with connected(wide, stores[:world], quantize=quantize, **options) as (engine, them):
            tokens = (await engine.complete(PROMPT, PARAMS)).token_ids
            for rank, client in enumerate(them, start=1):
                wanted = unit_sizes(wide, world, rank, quantize, options.get("ratio"))
                lacking = {k: n for k, n in wanted.items() if k not in held[rank]}
                assert client.sent == sum(lacking.values()), (world, options, rank)
                assert len(client.units) == len(lacking)
                held[rank] |= wanted.keys()
                saved += sum(wanted.values()) - client.sent
        fresh = [tmp_path / f"fresh{world}{options}{rank}" for rank in range(world)]
        async with connected(wide, fresh, quantize=quantize, **options) as (engine, _):
            assert (await engine.complete(PROMPT, PARAMS)).token_ids == tokens
    assert saved > 0


async def test_an_upload_that_was_cut_goes_on_where_it_ended(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last whole block: a unit of the next one has come, and comes again."""
    stores = [tmp_path / "master", tmp_path / "worker"]
    spec = slice_spec(wide, 2, 1, "none")
    whole, cut = 4, next(n for n, (block, _) in enumerate(spec.places) if block == 4) + 1
    upload = CountingClient.upload

    async def cut_off(self: CountingClient, method: str, chunks: Any, timeout_s: float) -> bytes:
        async def some() -> AsyncIterator[bytes]:
            async for data in chunks:
                if decode_call(UnitChunk, data, "test").unit == cut:
                    raise PeerLostError("the link went down", peer_id=self.peer_id)
                yield data

        return await upload(self, method, some(), timeout_s)

    with monkeypatch.context() as patch:
        patch.setattr(CountingClient, "upload", cut_off)
        with pytest.raises(PeerLostError):
            async with connected(wide, stores):
                pass
    async with connected(wide, stores) as (engine, (client,)):
        places = enumerate(spec.places)
        assert client.sent == sum(spec.unit_bytes(n) for n, (b, _) in places if b >= whole)
        tokens = (await engine.complete(PROMPT, PARAMS)).token_ids
    async with connected(wide, [tmp_path / "other", tmp_path / "fresh"]) as (engine, _):
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == tokens


async def test_worker_that_becomes_another_rank_lacks_what_it_never_had(
    wide: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    async with connected(wide, [tmp_path / "master", one, two]):
        pass
    async with connected(wide, [tmp_path / "master", two, one]) as (_, clients):
        for rank, client in enumerate(clients, start=1):
            before = unit_sizes(wide, 3, 3 - rank, "none")
            wanted = unit_sizes(wide, 3, rank, "none")
            assert client.sent == sum(n for key, n in wanted.items() if key not in before) > 0


async def test_master_that_forgot_what_it_cut_checks_the_workers_word(
    wide: Path, tmp_path: Path
) -> None:
    stores = [tmp_path / "master", tmp_path / "worker"]
    async with connected(wide, stores):
        pass
    for manifest in (stores[0] / "known").iterdir():
        manifest.unlink()
    async with connected(wide, stores) as (engine, (client,)):
        assert client.sent == 0  # cut and compared here
        await engine.complete(PROMPT, PARAMS)


async def test_chunks_are_small_enough_for_slow_links(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 1}
    model = make_model(tmp_path / "m", "llama", head_dim=16, **sizes)
    async with connected(model, [tmp_path / "a", tmp_path / "b"]) as (_, (client,)):
        assert client.largest == 64 << 10  # five seconds at 100 kbit/s


async def test_edited_rows_are_sent_and_used(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "llama", hidden_size=128, intermediate_size=512)
    stores = [tmp_path / "a", tmp_path / "b"]
    file = model / "model.safetensors"
    async with connected(model, stores) as (engine, _):
        before = await engine.logits(PROMPT)
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][350:450] *= -1  # 100 of 512, in the middle
    save_file(tensors, file, metadata={"format": "pt"})
    async with connected(model, stores) as (engine, (client,)):
        assert client.sent > 0
        after = await engine.logits(PROMPT)
    async with connected(model, [tmp_path / "c", tmp_path / "d"]) as (engine, _):
        assert torch.equal(await engine.logits(PROMPT), after)
    assert not torch.equal(before, after)


async def test_touched_or_copied_checkpoint_is_not_sliced_again(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "llama")
    stores = [tmp_path / "a", tmp_path / "b"]
    async with connected(model, stores):
        pass
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    files = sorted(p for store in stores for p in store.rglob("*.safetensors"))
    times = [path.stat().st_ctime_ns for path in files]
    async with connected(copy, stores) as (_, (client,)):
        assert client.sent == 0
    assert [path.stat().st_ctime_ns for path in files] == times


async def test_new_slices_are_announced_with_the_stores_size_and_what_it_has_instead(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores = [tmp_path / "master", tmp_path / "peer"]
    caplog.set_level("INFO", "tpirt")
    async with connected(model, stores):
        pass
    mine, sent = caplog.messages
    used = format_bytes(sum(path.stat().st_size for path in stores[0].glob("*/*.safetensors")))
    assert mine == (
        "new slice of tiny (float32, heads 0-3, columns 0-79, LM head): "
        f"adds {used} to {stores[0]}, which then has {used}"
    )
    assert sent.startswith("sending rank 1 (memory:1) a new slice of tiny (float32, heads 4-7")
    caplog.clear()
    async with connected(model, stores):  # nothing is new
        pass
    assert caplog.messages == []
    async with connected(model, stores, quantize="int8"):
        pass
    assert "new slice of tiny (int8, heads 0-3" in caplog.messages[0]
    assert re.search(r"; other slices of this model there: \w+ \(float32", caplog.messages[0])


async def test_masters_store_is_bounded(model: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"may have 100 B.*--store-limit"):
        async with connected(model, [tmp_path], store_limit_bytes=100):
            pytest.fail("loaded")


class Refusing(CountingClient):
    """Takes a part of a slice and refuses the rest."""

    chunks: Any = None

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        self.chunks = chunks
        await anext(chunks)
        raise StoreError("no room")


async def test_a_slice_that_is_refused_is_let_go(model: Path, tmp_path: Path) -> None:
    """Its messages refer to the whole engine, and they end only when they are closed."""
    client = Refusing(tmp_path / "1", 1)
    options = EngineOptions(dtype="float32", threads=1, store=tmp_path / "0")
    with pytest.raises(StoreError, match="no room"):
        async with Engine.connect(model, options, peers=[client]):
            pass
    assert client.chunks.ag_frame is None


class Standing(CountingClient):
    """Takes a part of a slice, and the rest only when it has been asked whether it is there."""

    answers = True
    slow = False  # it takes more while it is asked

    def __init__(self, store: Path, rank: int):
        super().__init__(store, rank)
        self.stands = False
        self.uploads = 0
        self._asked = asyncio.Event()

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        if self.stands and method == "Hello":
            if not self.answers:
                await asyncio.sleep(timeout_s)
                if self.slow:
                    self._asked.set()
                    await asyncio.sleep(0.05)
                raise PeerUnreachableError(f"peer {self.peer_id}: no answer")
            self._asked.set()
        return await super().call(method, request, timeout_s)

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        self.uploads += 1

        async def standing() -> AsyncIterator[bytes]:
            async for data in chunks:
                yield data
                self.stands = True
                await self._asked.wait()

        try:
            return await super().upload(method, standing(), timeout_s)
        finally:
            self.stands = False


@pytest.mark.parametrize(("answers", "slow"), [(True, False), (False, True), (False, False)])
async def test_an_upload_stands_still_for_as_long_as_its_worker_answers(
    model: Path, tmp_path: Path, answers: bool, slow: bool
) -> None:
    """Or takes something: it may read what it keeps, or its link be slow, but not be cut."""
    client = Standing(tmp_path / "1", 1)
    client.answers, client.slow = answers, slow
    options = EngineOptions(dtype="float32", threads=1, store=tmp_path / "0", timeout_s=0.4)
    async with asyncio.timeout(20):
        if answers or slow:
            async with Engine.connect(model, options, peers=[client]) as engine:
                assert len((await engine.complete(PROMPT, PARAMS)).token_ids) == 6
            assert client.uploads == 1
        else:
            with pytest.raises(PeerLostError, match=r"answered nothing for 0\.4 s"):
                async with Engine.connect(model, options, peers=[client]):
                    pytest.fail("loaded")


_RATE = 16 << 20


class OnAnotherHost(CountingClient):
    """Records who is being sent a slice, and when."""

    at_once: ClassVar[int] = 0
    most: ClassVar[int] = 0
    began_s: ClassVar[float] = 0.0
    ended_s: ClassVar[float] = 0.0

    def __init__(self, store: Path, rank: int, host: str):
        super().__init__(store, rank)
        self.address = f"{host}:50051"

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        kind = OnAnotherHost
        kind.began_s = kind.began_s or time.monotonic()
        kind.at_once += 1
        kind.most = max(kind.most, kind.at_once)
        try:
            return await super().upload(method, chunks, timeout_s)
        finally:
            kind.at_once -= 1
            kind.ended_s = time.monotonic()


@pytest.mark.parametrize(("hosts", "at_once"), [("aaa", 1), ("abc", 3)])
async def test_hosts_are_served_at_once_within_the_limit(
    wide: Path, tmp_path: Path, hosts: str, at_once: int
) -> None:
    kind = OnAnotherHost
    kind.most, kind.began_s = 0, 0.0
    clients = [kind(tmp_path / f"{rank}", rank, host) for rank, host in enumerate(hosts, start=1)]
    options = EngineOptions(
        dtype="float32",
        threads=1,
        store=tmp_path / "0",
        collective="star",
        upload_bytes_per_s=_RATE,
    )
    async with Engine.connect(wide, options, peers=clients):
        pass
    assert kind.most == at_once
    sent = sum(client.sent for client in clients)
    assert sent == sum(sum(unit_sizes(wide, 4, rank, "none").values()) for rank in (1, 2, 3))
    assert kind.ended_s - kind.began_s > 0.9 * (sent - (64 << 10)) / _RATE
