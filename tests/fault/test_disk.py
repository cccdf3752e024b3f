"""Disks that fill up, files that vanish or are not what they seem, memory that does not suffice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from tpirt.transport.pb import tpirt_pb2 as pb

from tpirt.cli.main import main
from tpirt.cluster.provision import SliceMaker
from tpirt.cluster.worker import Worker
from tpirt.config import ModelConfig
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import MemoryLimitError, StoreError, TpirtError
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_plan
from tpirt.testing.cluster import MemoryPeerClient, memory_engine
from tpirt.types import SamplingParams
from tpirt.weights.checkpoint import Checkpoint
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
        assert "peer rank1" in str(caught.value)
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
        case "newer manifest":
            manifest.write_text(manifest.read_text().replace('version": 1', 'version": 2'))
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
    "block missing",
    "block short",
    "block long",
]


@pytest.mark.parametrize("how", DAMAGES)
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


async def test_foreign_content_of_a_store_is_passed_by(model: Path, tmp_path: Path) -> None:
    for name, text in (("a", "{"), ("b", '{"name": "x"}'), ("c", "\0\xff"), ("d", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text, encoding="latin-1")
    (tmp_path / "manifest.json").write_text("null")
    (tmp_path / "e").write_text("a file")
    (tmp_path / "f").symlink_to("nowhere")
    async with memory_engine(model, 2, store=tmp_path) as engine:
        await engine.complete(PROMPT, PARAMS)


async def test_slice_of_another_model_under_the_right_name_is_refused(
    model: Path, tmp_path: Path
) -> None:
    """A manifest copied over: its files are not those its model asks for."""
    async with memory_engine(model, 2, store=tmp_path):
        pass
    manifest = slice_of_worker(tmp_path) / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["shard"]["q_heads"] = [0, 8]
    manifest.write_text(json.dumps(fields))
    with pytest.raises(TpirtError, match="not those of this model"):
        async with memory_engine(model, 2, store=tmp_path):
            pytest.fail("loaded")


# -- what is sent to a store -----------------------------------------------------------------


async def upload(maker: SliceMaker, store: Path, change: object = None) -> None:
    """Send rank 1's slice as a master does, with one thing changed on its way."""
    plan = make_plan(maker.config, 2)
    text = maker.manifest(plan.shards[1]).to_json()
    if isinstance(change, dict):
        text = json.dumps(json.loads(text) | change)

    async def chunks() -> AsyncIterator[pb.SliceChunk]:
        from tpirt.cluster.provision import _next_chunk

        if change == "no manifest":
            return
        yield pb.SliceChunk(manifest=text)
        pieces = maker.pieces(plan, 1, SliceStore(store))
        number = 0
        while (chunk := _next_chunk(pieces)) is not None:
            number += 1
            if number == 3:
                match change:
                    case "ends early":
                        return
                    case "dies":
                        raise ConnectionResetError
                    case "bit flipped":
                        data = bytearray(chunk.data)
                        data[len(data) // 2] ^= 1
                        chunk.data = bytes(data)
                    case "left out":
                        continue
                    case "twice":
                        yield pb.SliceChunk(chunk=chunk)
                    case "manifest again":
                        yield pb.SliceChunk(manifest=text)
                    case "another block":
                        chunk.block = 40
            yield pb.SliceChunk(chunk=chunk)

    await MemoryPeerClient(worker(store)).put_slice(chunks())


async def test_whole_upload_is_kept(maker: SliceMaker, tmp_path: Path) -> None:
    await upload(maker, tmp_path)
    assert len(whole_slices(tmp_path)) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no manifest", "must begin with its manifest"),
        ("ends early", "ends early"),
        ("bit flipped", "checksum mismatch"),
        ("left out", "out of order"),
        ("twice", "out of order"),
        ("manifest again", "out of order"),
        ("another block", "out of order"),
        ({"slice_id": "../../../evil"}, "id that is none"),
        ({"slice_id": "/tmp/evil"}, "id that is none"),
        ({"slice_id": ""}, "id that is none"),
        ({"slice_id": None}, "id that is none"),
        ({"blocks": [{"name": "../evil", "nbytes": 5}]}, "outside its folder"),
        ({"blocks": [{"name": "/tmp/evil", "nbytes": 5}]}, "outside its folder"),
        ({"blocks": [{"name": "..", "nbytes": 5}]}, "outside its folder"),
        ({"blocks": [{"name": "a\0b", "nbytes": 5}]}, "outside its folder"),
        ({"blocks": [{"name": "", "nbytes": 5}]}, "outside its folder"),
        ({"blocks": [{"name": 7, "nbytes": 5}]}, "outside its folder"),
        ({"blocks": [{"name": "a", "nbytes": -5}]}, "-5 bytes"),
        ({"blocks": [{"name": "a", "nbytes": "5"}]}, "bytes"),
        ({"blocks": [{"name": "a", "nbytes": 5}] * 2}, "different names"),
        ({"blocks": []}, "different names"),
        ({"blocks": 3}, "not a slice manifest"),
        ({"shard": []}, "not a slice manifest"),
        ({"extra": 1}, "not a slice manifest"),
        ({"format_version": 1}, "format 1"),
        ({"blocks": [{"name": "a", "nbytes": 1 << 60}]}, "make room"),
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
    with pytest.raises(ConnectionResetError):
        await upload(maker, tmp_path, "dies")
    assert list(tmp_path.iterdir()) == []


async def test_upload_is_refused_while_another_master_is_served(
    maker: SliceMaker, model: Path, tmp_path: Path
) -> None:
    service = worker(tmp_path / "worker")
    async with Engine.connect(
        model,
        EngineOptions(dtype="float32", threads=1, store=tmp_path / "master"),
        peers=[MemoryPeerClient(service)],
    ) as engine:
        with pytest.raises(TpirtError, match="serves another master"):
            async with Engine.connect(
                model, EngineOptions(store=tmp_path / "master"), peers=[MemoryPeerClient(service)]
            ):
                pytest.fail("loaded")

        async def chunks() -> AsyncIterator[pb.SliceChunk]:
            yield pb.SliceChunk(manifest="{}")

        with pytest.raises(TpirtError, match="serves master already"):
            await MemoryPeerClient(service).put_slice(chunks())
        await engine.complete(PROMPT, PARAMS)  # the one that is served notices nothing


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
    assert text.startswith("rank 1 (rank1): its memory limit of 50 MiB is too low")
    assert "raise --memory of rank1 to at least" in text
