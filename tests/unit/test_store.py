"""The slice store: whole or not there, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from tpirt.errors import StoreError
from tpirt.ops.quant import Int8
from tpirt.sharding.blocks import Block, StoredTensor
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Shard, Span
from tpirt.weights import store as module
from tpirt.weights.layout import block_header
from tpirt.weights.store import Manifest, SliceStore, SliceWriter, StoredSlice, default_store

FORM = WeightFormat(torch.float32)
SHARD = Shard(Span(0, 2), Span(0, 1), Span(0, 8), first=True)


def blocks(count: int = 3, size: int = 100) -> list[Block]:
    return [
        Block(f"layers.{i}.mlp", (StoredTensor("t", (size + i,), torch.float32, ()),))
        for i in range(count)
    ]


def manifest(size: int = 100, model: str = "m", fingerprint: str = "f" * 32) -> Manifest:
    return Manifest.plan(fingerprint, model, FORM, SHARD, blocks(size=size))


def content(planned: Manifest, index: int) -> bytes:
    head = block_header(blocks()[index]) if index < 3 else b""
    body = bytes(i * 7 % 251 for i in range(planned.blocks[index].nbytes - len(head)))
    return head + body


def fill(writer: SliceWriter, chunk: int = 1000) -> None:
    for index, entry in enumerate(writer.manifest.blocks):
        data = content(writer.manifest, index)
        assert len(data) == entry.nbytes
        for start in range(0, len(data), chunk):
            writer.write(index, start, data[start : start + chunk])


def put(store: SliceStore, planned: Manifest | None = None) -> StoredSlice:
    with store.write(planned or manifest()) as writer:
        fill(writer)
        return writer.commit()


def leftovers(store: SliceStore) -> list[str]:
    return [path.name for path in store.root.iterdir() if path.name.startswith(".")]


@pytest.fixture
def store(tmp_path: Path) -> SliceStore:
    return SliceStore(tmp_path / "deep" / "store")


def test_written_slice_is_found_with_its_bytes_and_checksums(store: SliceStore) -> None:
    planned = manifest()
    assert store.find(planned.slice_id) is None
    written = put(store)
    found = store.find(planned.slice_id)
    assert found == written
    assert found is not None
    for index, entry in enumerate(found.manifest.blocks):
        data = found.block_path(index).read_bytes()
        assert data == content(planned, index)
        assert entry.xxh3_128 == xxhash.xxh3_128_hexdigest(data)
    assert leftovers(store) == []


def test_store_may_be_the_slice_folder_itself_or_hold_renamed_ones(store: SliceStore) -> None:
    written = put(store)
    assert SliceStore(written.path).find(written.manifest.slice_id) == written
    renamed = written.path.rename(store.root / "rank0")
    found = store.find(written.manifest.slice_id)
    assert found is not None
    assert found.path == renamed


def test_identity_covers_model_dtype_and_shard() -> None:
    same = manifest()
    assert same.slice_id == manifest(model="renamed").slice_id
    others = [
        manifest(fingerprint="e" * 32),
        Manifest.plan("f" * 32, "m", WeightFormat(torch.bfloat16), SHARD, blocks()),
        *(
            Manifest.plan("f" * 32, "m", FORM, Shard(*[Span(0, 1)] * 3, first=first), blocks())
            for first in (True, False)
        ),
        Manifest.plan("f" * 32, "m", WeightFormat(FORM.dtype, Int8()), SHARD, blocks()),
    ]
    assert len({m.slice_id for m in (same, *others)}) == 6


# -- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_left_without_commit_leaves_nothing(store: SliceStore, written: int) -> None:
    planned = manifest()
    with store.write(planned) as writer:
        for index in range(written):
            writer.write(index, 0, content(planned, index))
        assert store.find(planned.slice_id) is None
    assert leftovers(store) == []
    assert store.find(planned.slice_id) is None


def test_error_within_leaves_nothing(store: SliceStore) -> None:
    class LeftError(Exception):
        pass

    def leave() -> None:
        with store.write(manifest()) as writer:
            writer.write(0, 0, b"half of")
            raise LeftError

    with pytest.raises(LeftError):
        leave()
    assert leftovers(store) == []


CRASH = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_store as t
store = t.SliceStore(Path({root!r}))
writer = store.write(t.manifest())
point = {point!r}
if point == "amid":
    writer.write(0, 0, b"half of")
    os._exit(9)
def stop(*_):
    os._exit(9)
setattr(t.module.os, point, stop)
t.fill(writer)
writer.commit()
os._exit(1)
"""


@pytest.mark.parametrize("point", ["amid", "fsync", "rename"])
def test_crash_is_as_if_nothing_had_been(store: SliceStore, point: str) -> None:
    code = CRASH.format(tests=str(Path(__file__).parent), root=str(store.root), point=point)
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 9
    assert len(leftovers(store)) == 1
    assert store.find(manifest().slice_id) is None
    put(store)  # the next writer sweeps up
    assert leftovers(store) == []
    assert store.find(manifest().slice_id) is not None


def test_writers_at_work_are_not_swept_up(store: SliceStore) -> None:
    with store.write(manifest()) as first:
        put(store, manifest(fingerprint="e" * 32))
        fill(first)
        first.commit()
    assert store.find(manifest().slice_id) is not None


# -- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [(0, 1), (1, 0), (0, 5), (2, 0), (7, 0)])
def test_chunks_out_of_order_are_refused(store: SliceStore, at: tuple[int, int]) -> None:
    with store.write(manifest()) as writer:
        writer.write(0, 0, b"abc")
        for place in (at, (0, 0)):
            with pytest.raises(StoreError, match="out of order"):
                writer.write(*place, b"def")
        with pytest.raises(StoreError, match=r"ends early: layers\.0\.mlp"):
            writer.commit()


def test_too_many_bytes_are_refused(store: SliceStore) -> None:
    planned = manifest()
    with store.write(planned) as writer:
        with pytest.raises(StoreError, match="more than"):
            writer.write(0, 0, content(planned, 0) + b"x")
        fill(writer)
        with pytest.raises(StoreError, match="out of order"):
            writer.write(3, 0, b"x")


def test_missing_blocks_are_named(store: SliceStore) -> None:
    planned = manifest()
    with store.write(planned) as writer:
        for index in (0, 1):
            writer.write(index, 0, content(planned, index))
        with pytest.raises(StoreError, match=r"layers\.2\.mlp is missing"):
            writer.commit()


def test_manifest_round_trip_and_no_other_format() -> None:
    planned = manifest()
    text = planned.to_json()
    assert Manifest.from_json(text) == planned
    assert Manifest.from_json(text.encode()) == planned
    with pytest.raises(StoreError, match="format 99"):
        Manifest.from_json(json.dumps({**json.loads(text), "format_version": 99}))


def spoilt() -> Iterator[Any]:
    good = json.loads(manifest().to_json())
    yield pytest.param("", id="empty")
    yield pytest.param("[]", id="list")
    yield pytest.param("null", id="null")
    yield pytest.param(json.dumps(good)[:-30], id="cut")
    for key in good:
        yield pytest.param(json.dumps({k: v for k, v in good.items() if k != key}), id=f"no-{key}")
    yield pytest.param(json.dumps({**good, "more": 1}), id="more")
    yield pytest.param(json.dumps({**good, "shard": {"first": True}}), id="shard")
    for name in ("../x", "a/b", ".hidden", "/etc/passwd", ""):
        bad = {**good, "blocks": [{"name": name, "nbytes": 1, "xxh3_128": ""}]}
        yield pytest.param(json.dumps(bad), id=f"name-{name}")


@pytest.mark.parametrize("text", list(spoilt()))
def test_wrong_manifests_are_refused(text: str) -> None:
    with pytest.raises(StoreError):
        Manifest.from_json(text)


def test_damage_is_found_and_named(store: SliceStore) -> None:
    written = put(store)
    slice_id = written.manifest.slice_id
    file = written.block_path(1)
    good = file.read_bytes()
    for bad, reason in ((good[:-1], "expected"), (good + b"x", "expected"), (None, "No such file")):
        if bad is None:
            file.unlink()
        else:
            file.write_bytes(bad)
        with pytest.raises(StoreError, match=rf"layers\.1\.mlp\.safetensors.*{reason}"):
            store.find(slice_id)
    put(store)  # written anew over the damaged one
    assert store.find(slice_id) is not None
    (written.path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        store.find(slice_id)


# -- disks -------------------------------------------------------------------------------------


def test_too_small_a_disk_is_refused_before_writing(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": manifest().nbytes - 1})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"the slice needs [\d,]+ bytes.*free"):
        store.write(manifest())
    assert leftovers(store) == []


def test_full_disk_amid_writing(store: SliceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with store.write(manifest()) as writer:
        writer.write(0, 0, b"abc")
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "fsync", full)
            with pytest.raises(StoreError, match="No space left"):
                writer.write(0, 3, content(manifest(), 0)[3:])
    assert leftovers(store) == []
    assert store.find(manifest().slice_id) is None


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode
    except OSError:
        done = -1
    if done != 0:
        pytest.skip("no right to mount a file system here")
    yield path
    subprocess.run(["umount", str(path)], timeout=20, check=True)


def test_full_disk_for_real(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1 << 40})  # somebody else fills it meanwhile
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    store = SliceStore(tiny_disk)
    planned = manifest(size=60_000)
    nbytes = planned.blocks[0].nbytes

    def write(writer: SliceWriter) -> None:
        for start in range(0, nbytes, 4096):
            writer.write(0, start, bytes(min(4096, nbytes - start)))

    with store.write(planned) as writer, pytest.raises(StoreError, match="No space left"):
        write(writer)
    assert leftovers(store) == []


def test_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the slice"):
        SliceStore(tmp_path / "file").write(manifest())
    assert SliceStore(tmp_path / "file").find(manifest().slice_id) is None


def test_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_store() == Path("/somewhere/tpirt/slices")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_store() == Path("/home/me/.cache/tpirt/slices")
