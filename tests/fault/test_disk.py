"""Disks that fill up, files that vanish or are not what they seem, memory that does not suffice."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.nightly import nightly_but
from tpirt.cli.main import main
from tpirt.cluster.provision import Delivery, lacking_units, unit_chunks
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.cluster.worker import Worker
from tpirt.config import ModelConfig
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import MemoryLimitError, StoreError, TpirtError
from tpirt.protocol.messages import UnitChunk, encode_call
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.testing.cluster import MemoryPeerClient, memory_engine
from tpirt.types import SamplingParams
from tpirt.weights.checkpoint import Checkpoint
from tpirt.weights.manifest import FORMAT_VERSION, NO_DIGEST, SliceOrder
from tpirt.weights.store import SliceStore

PROMPT = list(range(10, 30))
PARAMS = SamplingParams(max_tokens=5)


@pytest.fixture(scope="module")
def maker(model: Path) -> Iterator[SliceMaker]:
    with Checkpoint.open(model) as checkpoint:
        yield SliceMaker(checkpoint, ModelConfig.from_dir(model), WeightFormat(torch.float32))


def worker(store: Path, memory_bytes: int | None = None) -> Worker:
    return Worker("rank1", SliceStore(store), memory_bytes, 1, lambda _: None)


def whole_slices(store: Path) -> list[Path]:
    return [path.parent for path in store.glob("**/manifest.json")]


def slice_of_worker(store: Path) -> Path:
    (found,) = (
        folder
        for folder in whole_slices(store)
        if not json.loads((folder / "manifest.json").read_text())["shard"]["first"]
    )
    return found


# -- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["removed", "truncated", "unreadable"])
async def test_block_lost_while_streaming_is_named_and_the_group_lives_on(
    model: Path, tmp_path: Path, damage: str
) -> None:
    async with memory_engine(model, 2, store=tmp_path, window=2, timeout_s=10) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
        block = slice_of_worker(tmp_path) / "layers.1.mlp.safetensors"
        kept = block.read_bytes()
        block.unlink()
        if damage == "truncated":
            block.write_bytes(kept[: len(kept) // 2])
        elif damage == "unreadable":
            block.mkdir()
        tokens: list[int] = []

        async def until_it_fails() -> None:
            while True:  # a block or two may have been read ahead
                async for token in engine.generate(PROMPT[: len(PROMPT) - len(tokens)], PARAMS):
                    tokens.append(token.id)

        with pytest.raises(StoreError) as caught:
            await until_it_fails()
        assert "peer memory:1" in str(caught.value)
        assert str(block) in str(caught.value)  # which has the block's name
        assert engine.broken is None
        with pytest.raises(StoreError):  # and again, as long as it is so
            await engine.complete(PROMPT, PARAMS)
        if damage == "unreadable":
            block.rmdir()
        block.write_bytes(kept)
        engine.reset()
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected


async def test_block_lost_on_the_master_leaves_the_workers_in_step(
    model: Path, tmp_path: Path
) -> None:
    async with memory_engine(model, 2, store=tmp_path, window=2, timeout_s=10) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
        (mine,) = set(whole_slices(tmp_path)) - {slice_of_worker(tmp_path)}
        block = mine / "layers.2.attention.safetensors"
        moved = block.rename(tmp_path / "away")
        with pytest.raises(StoreError, match=r"layers\.2\.attention"):
            await engine.complete(PROMPT * 2, PARAMS)  # 5 steps: what was read ahead is used up
        moved.rename(block)
        engine.reset()
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected


# -- what lies in a store --------------------------------------------------------------------


def spoil(folder: Path, how: str) -> None:
    manifest = folder / "manifest.json"
    block = folder / "layers.0.mlp.safetensors"
    match how:
        case "no manifest":
            manifest.unlink()
        case "broken manifest":
            manifest.write_text('{"format_version": 1, "slice')
        case "foreign manifest":
            manifest.write_text('{"name": "a web application", "icons": []}')
        case "newer manifest" | "older manifest":
            fields = json.loads(manifest.read_text())
            assert fields["format_version"] == FORMAT_VERSION
            fields["format_version"] += 1 if how == "newer manifest" else -1
            manifest.write_text(json.dumps(fields))
        case "block missing":
            block.unlink()
        case "block short":
            os.truncate(block, block.stat().st_size - 1)
        case "block long":
            with open(block, "ab") as file:
                file.write(b"!")


DAMAGES = [
    "no manifest",
    "broken manifest",
    "foreign manifest",
    "newer manifest",
    "older manifest",
    "block missing",
    "block short",
    "block long",
]


# Each is refused at another place: by the manifest's reader, for its format, for a block's size.
QUICK_DAMAGES = {"broken manifest", "older manifest", "block short"}


@pytest.mark.parametrize("how", nightly_but(QUICK_DAMAGES, DAMAGES))
async def test_damaged_slices_of_master_and_worker_are_made_anew(
    model: Path, tmp_path: Path, how: str
) -> None:
    async with memory_engine(model, 2, store=tmp_path) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
    assert len(whole_slices(tmp_path)) == 2
    for folder in whole_slices(tmp_path):
        spoil(folder, how)
    async with memory_engine(model, 2, store=tmp_path) as engine:
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
    assert len(whole_slices(tmp_path)) == 2


async def test_the_masters_own_disk_is_no_workers_fault(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The master cannot read what it has of a worker's slice: no worker is left out for that."""
    async with memory_engine(model, 2, store=tmp_path / "master"):
        pass

    def failing(path: Path, target: memoryview, nbytes: int) -> None:
        raise StoreError(f"{path}: Input/output error")

    asked: list[int] = []

    class Client(MemoryPeerClient):
        async def upload(
            self, method: str, chunks: AsyncIterator[bytes], timeout_s: float
        ) -> bytes:
            asked.append(self._rank)
            return await super().upload(method, chunks, timeout_s)

    monkeypatch.setattr("tpirt.weights.store.read_file", failing)
    healthy, spare = (Client(worker(tmp_path / f"worker{rank}"), rank) for rank in (1, 2))
    options = EngineOptions(threads=1, dtype="float32", store=tmp_path / "master")
    with pytest.raises(StoreError, match=r"master/.*: Input/output error") as caught:
        async with Engine.connect(model, options, peers=[healthy], spares=[spare]):
            pass
    assert caught.value.peer_id == "master"
    assert asked == [1]


async def test_slices_of_the_former_format_are_named_and_made_anew(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Format 4 had queries, keys and values in one matrix."""
    async with memory_engine(model, 2, store=tmp_path, quantize="int4") as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
    before = whole_slices(tmp_path)
    for folder in before:
        fields = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**fields, "format_version": 4}))
    store = SliceStore(tmp_path)
    assert store.slices() == []
    assert [each.reason for each in store.unusable()] == ["written by an older tpirt"] * 2
    with pytest.raises(StoreError, match=r"manifest of format 4, this tpirt reads 5.*delete"):
        store.find(before[0].name)
    async with memory_engine(model, 1, store=tmp_path, quantize="int8"):
        assert "older tpirt" not in caplog.text  # those of another plan are not remade
    async with memory_engine(model, 2, store=tmp_path, quantize="int4") as engine:
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
    assert caplog.text.count("written by an older tpirt and are remade") == 1
    assert len(store.slices()) == 3
    assert store.unusable() == []


def test_slices_that_are_split_again_are_named_in_one_line(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = ["split", "--model", str(model), "--world-size", "3", "--out", str(tmp_path / "out")]
    assert main(split) == 0
    for folder in whole_slices(tmp_path / "out"):
        spoil(folder, "older manifest")
    assert main(split) == 0
    assert caplog.text.count("written by an older tpirt and are remade") == 1


async def test_foreign_content_of_a_store_is_passed_by(model: Path, tmp_path: Path) -> None:
    for name, text in (("a", "{"), ("b", '{"name": "x"}'), ("c", "\0\xff"), ("d", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text, encoding="latin-1")
    (tmp_path / "manifest.json").write_text("null")
    (tmp_path / "e").write_text("a file")
    (tmp_path / "f").symlink_to("nowhere")
    async with memory_engine(model, 2, store=tmp_path) as engine:
        await engine.complete(PROMPT, PARAMS)


async def test_manifest_that_was_edited_is_not_used(model: Path, tmp_path: Path) -> None:
    """Its id is that of its content, and of its shard."""
    async with memory_engine(model, 2, store=tmp_path) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
    manifest = slice_of_worker(tmp_path) / "manifest.json"
    before = manifest.read_text()
    fields = json.loads(before)
    fields["shard"]["q_heads"] = [0, 8]
    manifest.write_text(json.dumps(fields))
    async with memory_engine(model, 2, store=tmp_path) as engine:
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
    assert manifest.read_text() == before


# -- what is sent to a store -----------------------------------------------------------------


async def upload(
    maker: SliceMaker, store: Path, change: object = None, service: Worker | None = None
) -> None:
    """Send rank 1's slice as a master does, with one thing changed on its way."""
    plan = make_partition(maker.config, 2)
    spec = maker.spec(plan.shards[1])
    nothing = [NO_DIGEST] * len(spec.places)
    text = SliceOrder(spec, nothing).to_json()
    if isinstance(change, dict):
        fields = json.loads(text)
        if isinstance(change.get("config"), dict):
            change = {"config": fields["config"] | change["config"]}
        text = json.dumps(fields | change)

    async def chunks() -> AsyncIterator[UnitChunk]:
        if change == "no manifest":
            return
        yield UnitChunk(order=text)
        delivery = Delivery(nothing, list(range(len(nothing))))
        units = lacking_units(maker, plan.shards[1], delivery, SliceStore(store))
        for number, whole in enumerate(unit_chunks(units), start=1):
            chunk = whole
            if number == 3:
                match change:
                    case "ends early":
                        return
                    case "dies":
                        raise ConnectionResetError
                    case "bit flipped":
                        data = bytearray(chunk.data)
                        data[len(data) // 2] ^= 1
                        chunk = replace(chunk, data=bytes(data))
                    case "left out":
                        continue
                    case "twice":
                        yield chunk
                    case "manifest again":
                        yield UnitChunk(order=text)
                    case "another unit":
                        chunk = replace(chunk, unit=1 << 30)
                    case "other bytes":
                        zeros = bytes(len(chunk.data))
                        chunk = replace(chunk, data=zeros, crc32=zlib.crc32(zeros))
            yield chunk

    client = MemoryPeerClient(service or worker(store))
    await client.upload("PutUnits", (encode_call(c) async for c in chunks()), 20)


async def test_whole_upload_is_kept(maker: SliceMaker, tmp_path: Path) -> None:
    await upload(maker, tmp_path)
    assert len(whole_slices(tmp_path)) == 1


async def test_strangers_slice_is_noticed_and_the_right_one_is_sent(
    maker: SliceMaker, model: Path, tmp_path: Path
) -> None:
    """Somebody uploaded a slice of the right name and shard with one unit of other bytes."""
    async with memory_engine(model, 2, store=tmp_path / "reference") as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
    service = worker(tmp_path / "worker")
    await upload(maker, tmp_path / "worker", "other bytes", service)
    (wrong,) = whole_slices(tmp_path / "worker")
    async with connected(model, service, tmp_path / "master") as engine:
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected
        assert len(whole_slices(tmp_path / "worker")) == 2
        # Nor does it matter when it comes back later.
        shutil.rmtree(wrong)
    await upload(maker, tmp_path / "worker", "other bytes", service)
    async with connected(model, service, tmp_path / "master") as engine:
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected


@pytest.mark.parametrize("change", [None, "other bytes"])
async def test_upload_begun_before_a_session_changes_nothing_of_it(
    maker: SliceMaker, model: Path, tmp_path: Path, change: str | None
) -> None:
    service = worker(tmp_path / "worker")
    begun, may_end = asyncio.Event(), asyncio.Event()

    class Slow(Worker):
        async def receive(self, method: str, chunks: AsyncIterator[bytes]) -> bytes:
            async def slowly() -> AsyncIterator[bytes]:
                async for chunk in chunks:
                    yield chunk
                    if not begun.is_set():
                        begun.set()
                        await may_end.wait()

            return await service.receive(method, slowly())

    slow = Slow("slow", SliceStore(tmp_path / "worker"), None, 1, lambda _: None)
    uploading = asyncio.create_task(upload(maker, tmp_path / "worker", change, slow))
    await begun.wait()
    async with connected(model, service, tmp_path / "master", window=2) as engine:
        expected = (await engine.complete(PROMPT, PARAMS)).token_ids
        may_end.set()
        await uploading
        engine.reset()
        assert (await engine.complete(PROMPT, PARAMS)).token_ids == expected


@asynccontextmanager
async def connected(
    model: Path, service: Worker, store: Path, window: int | None = None
) -> AsyncIterator[Engine]:
    options = EngineOptions(dtype="float32", threads=1, store=store, window=window)
    async with Engine.connect(model, options, peers=[MemoryPeerClient(service)]) as engine:
        yield engine


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no manifest", "must begin with its order"),
        ("ends early", "ends early"),
        ("bit flipped", "checksum mismatch"),
        ("left out", "ends early"),
        ("twice", "out of order"),
        ("manifest again", "checksum mismatch"),
        ("another unit", "out of order"),
        ({"slice_id": "../../../evil"}, "slice_id"),
        ({"blocks": []}, "not a slice manifest"),
        ({"shard": []}, "not a slice manifest"),
        ({"shard": {"first": False}}, "not a slice manifest"),
        ({"extra": 1}, "not a slice manifest"),
        ({"format_version": 1}, "format 1"),
        ({"digests": "00" * 16}, "1 digests"),
        ({"digests": "evil"}, "digests"),
        ({"config": 7}, "not a slice manifest"),
        ({"config": {"num_hidden_layers": 1 << 40}}, "slice manifest"),
        ({"config": {"hidden_size": 1 << 30}}, "of memory"),
        ({"model": "m" * 1000}, "short text"),
    ],
    ids=str,
)
async def test_upload_that_is_not_as_it_should_be_is_refused_and_leaves_nothing(
    maker: SliceMaker, tmp_path: Path, change: object, says: str
) -> None:
    store = tmp_path / "deep" / "in" / "store"
    with pytest.raises(TpirtError, match=says):
        await upload(maker, store, change)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []


async def test_upload_cut_off_leaves_nothing(maker: SliceMaker, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(ConnectionResetError):
        await upload(maker, store, "dies")
    assert list(store.iterdir()) == []


async def test_a_master_that_is_served_notices_nothing_of_others(
    maker: SliceMaker, model: Path, tmp_path: Path
) -> None:
    service = worker(tmp_path / "worker")
    async with Engine.connect(
        model,
        EngineOptions(dtype="float32", threads=1, store=tmp_path / "master"),
        peers=[MemoryPeerClient(service)],
    ) as engine:
        with pytest.raises(TpirtError, match=r"is busy with .* since"):
            async with Engine.connect(
                model, EngineOptions(store=tmp_path / "master"), peers=[MemoryPeerClient(service)]
            ):
                pytest.fail("loaded")
        before = await engine.complete(PROMPT, PARAMS)
        await upload(maker, tmp_path / "worker", None, service)  # stored slices are immutable
        after = await engine.complete(PROMPT, PARAMS)
        assert after.token_ids == before.token_ids


# -- full disks ------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB: more than the first blocks, less than a slice."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_split_on_a_disk_that_is_too_small_says_so_beforehand(
    model: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["split", "--model", str(model), "--out", str(small_disk), "--world-size", "2"])
    err = capsys.readouterr().err
    assert code == 2
    assert str(small_disk) in err
    assert "bytes, the disk has" in err
    assert whole_slices(small_disk) == []


def test_disk_that_fills_up_while_splitting_keeps_no_half_slice(
    model: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else took the room that was there when it began."""
    plenty = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)
    arguments = ["split", "--model", str(model), "--out", str(small_disk), "--world-size", "2"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err == (
        f"tpirt: error: {small_disk}/rank0: cannot write the slice: No space left on device; "
        "nothing of it was kept\n"
    )
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []
    # With room again, it goes on as if nothing had been.
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main(arguments) == 0
    assert len(whole_slices(small_disk)) == 2


async def test_worker_whose_disk_fills_up_keeps_no_half_slice(
    maker: SliceMaker, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = shutil.disk_usage(maker.checkpoint.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)
    with pytest.raises(StoreError, match="No space left"):
        await upload(maker, small_disk)
    assert list(small_disk.iterdir()) == []


# -- memory ----------------------------------------------------------------------------------


async def test_workers_own_memory_limit_that_is_too_low_is_named(
    model: Path, tmp_path: Path
) -> None:
    client = MemoryPeerClient(worker(tmp_path / "worker", memory_bytes=50 << 20))
    with pytest.raises(MemoryLimitError) as caught:
        async with Engine.connect(
            model,
            EngineOptions(dtype="float32", threads=1, store=tmp_path / "master"),
            peers=[client],
        ):
            pytest.fail("loaded")
    text = str(caught.value)
    assert text.startswith("rank 1 (memory:1): its memory limit of 50 MiB is too low")
    assert "raise --memory of memory:1 to" in text
