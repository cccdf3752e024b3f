"""The slice store: a slice is whole or not there, and its id never means two contents."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pwd
import stat
import subprocess
import tempfile
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from tpirt.config import ModelConfig
from tpirt.errors import DamagedSliceError, StoreError
from tpirt.files import write_atomically
from tpirt.ops.quant import Int8
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.testing.processes import killed_at_exit, run_python, start_python
from tpirt.weights import unfinished as unfinished_module
from tpirt.weights import writer as module
from tpirt.weights.layout import file_bytes
from tpirt.weights.manifest import (
    MANIFEST,
    MAX_ORDER_BYTES,
    NO_DIGEST,
    Manifest,
    SliceOrder,
    SliceSpec,
)
from tpirt.weights.store import SliceStore, StoredSlice, default_store, remove_leftovers
from tpirt.weights.unfinished import PREFIX, unfinished
from tpirt.weights.writer import SliceWriter

FORM = WeightFormat(torch.float32)
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 20,
    }
)
Usage = namedtuple("Usage", "total free")


def spec(
    rank: int = 1,
    world: int = 2,
    fingerprint: str = "f" * 32,
    model: str = "m",
    form: WeightFormat = FORM,
    own: bool = False,
) -> SliceSpec:
    shard = make_partition(CONFIG, world).shards[rank]
    return SliceSpec(fingerprint, model, CONFIG, form, shard, own)


def content(planned: SliceSpec, number: int, seed: str = "") -> memoryview:
    """A unit's bytes follow from its key, as they do in a model."""
    key = planned.places[number][1].key
    size = planned.unit_bytes(number)
    stream = hashlib.shake_128(f"{seed}{key}".encode()).digest(size)
    return memoryview(stream)


def fill(writer: SliceWriter, seed: str = "") -> None:
    for number in writer.lacking:
        writer.put(number, content(writer.spec, number, seed))


def put(
    store: SliceStore, planned: SliceSpec | None = None, kept: Any = (), seed: str = ""
) -> StoredSlice:
    with SliceWriter(store, planned or spec(), kept) as writer:
        fill(writer, seed)
        return writer.commit()


def begin(store: SliceStore, planned: SliceSpec, blocks: int) -> None:
    """Write some blocks, and end."""
    with SliceWriter(store, planned) as writer:
        for index, block in enumerate(planned.blocks[:blocks]):
            writer.put_block(index, torch.zeros(file_bytes(block), dtype=torch.uint8))


def leftovers(store: SliceStore) -> list[str]:
    """Hidden files, save what is whole of slices that were not finished."""
    hidden = [path.name for path in store.root.iterdir() if path.name.startswith(".")]
    return [name for name in hidden if not name.startswith(PREFIX)]


@pytest.fixture
def store(tmp_path: Path) -> SliceStore:
    return SliceStore(tmp_path / "deep" / "store")


def test_written_slice_is_found_with_its_bytes_and_checksums(store: SliceStore) -> None:
    written = put(store)
    assert store.find(written.manifest.slice_id) == written
    assert store.slices() == [written]
    for index, entry in enumerate(written.manifest.blocks):
        data = written.block_path(index).read_bytes()
        assert len(data) == entry.nbytes
        assert entry.xxh3_128 == xxhash.xxh3_128_hexdigest(data)
    numbers = range(len(written.manifest.spec.places))
    digests = [hashlib.sha256(content(spec(), n)).digest()[:16] for n in numbers]
    assert store.inventory(spec()) == written.manifest.digests == digests
    assert leftovers(store) == []


def test_store_may_be_the_slice_folder_itself_or_hold_renamed_ones(store: SliceStore) -> None:
    written = put(store)
    assert SliceStore(written.path).find(written.manifest.slice_id) == written
    renamed = written.path.rename(store.root / "rank0")
    found = store.find(written.manifest.slice_id)
    assert found is not None
    assert found.path == renamed


def test_identity_covers_model_format_shard_and_content(store: SliceStore) -> None:
    same = put(store).manifest.slice_id
    assert put(store, spec(model="renamed")).manifest.slice_id == same
    others = [
        put(store, spec(fingerprint="e" * 32)),
        put(store, spec(form=WeightFormat(torch.bfloat16))),
        put(store, spec(rank=0)),
        put(store, spec(form=WeightFormat(FORM.dtype, Int8()))),
        put(store, spec(own=True)),
        put(store, seed="another content"),
    ]
    assert len({same, *(each.manifest.slice_id for each in others)}) == 7


def test_wrong_content_stands_beside_the_right_one_and_is_not_mistaken_for_it(
    store: SliceStore,
) -> None:
    wrong, right = put(store, seed="a stranger's"), put(store)
    wanted = right.manifest.digests
    assert wrong.path != right.path
    assert store.inventory(spec(), wanted) == wanted
    again = put(store, spec(1, 2), kept=wanted)
    assert again.manifest.slice_id == right.manifest.slice_id
    right.verify()


# -- another plan --------------------------------------------------------------------------------


def test_equal_blocks_are_one_file_and_the_rest_is_assembled(store: SliceStore) -> None:
    first = put(store, spec(0, 2))
    before = store.bytes_used()
    wanted = spec(0, 3)
    inventory = store.inventory(wanted)
    assert NO_DIGEST not in inventory  # a part of what is here
    second = put(store, wanted, kept=inventory)
    reference = put(SliceStore(store.root.parent / "other"), wanted)
    assert second.manifest == reference.manifest
    second.verify()
    shared = {file.content for file in first.manifest.blocks}
    for index, file in enumerate(second.manifest.blocks):
        links = second.block_path(index).stat().st_nlink
        assert links == (2 if file.content in shared else 1)
    own = store.own_bytes([first, second])
    assert own[second.path] < second.manifest.nbytes
    assert store.bytes_used() - before < second.manifest.nbytes + 20_000
    store.remove(first)
    second.verify()


def test_units_of_another_model_or_form_are_not_taken(store: SliceStore) -> None:
    put(store)
    for other in (
        spec(fingerprint="e" * 32),
        spec(form=WeightFormat(torch.bfloat16)),
        spec(own=True),
    ):
        assert set(store.inventory(other)) == {NO_DIGEST}
    put(store, spec(own=True))
    assert NO_DIGEST not in store.inventory(spec(own=True))
    assert set(store.inventory(spec(0, 3, own=True))) == {NO_DIGEST}


def test_damaged_source_is_named_and_does_not_spread(store: SliceStore) -> None:
    first = put(store, spec(0, 1))
    victim = first.block_path(1)
    data = bytearray(victim.read_bytes())
    data[-9] ^= 1
    victim.write_bytes(data)
    wanted = spec(0, 2)
    with pytest.raises(DamagedSliceError, match=r"layers\.0\.mlp.*checksum"):
        put(store, wanted, kept=store.inventory(wanted))
    assert leftovers(store) == []
    # Nothing is taken from it any more, and it is made again.
    assert store.slices() == []
    assert store.find(first.manifest.slice_id) is None
    held = store.inventory(wanted)
    assert [digest != NO_DIGEST for digest in held] == [b == 0 for b, _ in wanted.places]
    put(store, spec(0, 1)).verify()
    assert store.slices() == [first]


def test_what_is_kept_must_be_there(store: SliceStore) -> None:
    kept = put(SliceStore(store.root / "elsewhere")).manifest.digests
    with pytest.raises(StoreError, match="was removed while"):
        put(store, kept=kept)


def test_known_digests_serve_other_plans_too(store: SliceStore) -> None:
    both = [put(store, spec(rank, 2)).manifest for rank in (0, 1)]
    assert set(store.known(spec(0, 3))) == {NO_DIGEST}
    for manifest in both:
        store.remember(manifest)
    assert store.known(spec(1, 2)) == both[1].digests
    for rank in range(3):
        wanted = spec(rank, 3)
        numbers = range(len(wanted.places))
        expected = [hashlib.sha256(content(wanted, n)).digest()[:16] for n in numbers]
        # What a plan cuts at the ends of its columns is a unit of that plan only.
        known = store.known(wanted)
        assert all(k in (NO_DIGEST, e) for k, e in zip(known, expected, strict=True))
        assert known.count(NO_DIGEST) <= 6
    assert set(store.known(spec(1, 2, fingerprint="e" * 32))) == {NO_DIGEST}
    (store.root / "known" / f"{both[1].spec.key}.json").write_text("{")
    assert NO_DIGEST in store.known(spec(1, 2))


# -- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 1, 30])
def test_left_without_commit_is_no_slice(store: SliceStore, written: int) -> None:
    with SliceWriter(store, spec()) as writer:
        for number in writer.lacking[:written]:
            writer.put(number, content(spec(), number))
        assert store.slices() == []
    assert leftovers(store) == []
    assert store.slices() == []


def test_whole_blocks_of_a_writer_that_ends_early_are_taken_over(store: SliceStore) -> None:
    with SliceWriter(store, spec()) as writer:
        first, second = [[n for n, (b, _) in enumerate(spec().places) if b == k] for k in (0, 1)]
        for number in [*first, *second[:1]]:
            writer.put(number, content(spec(), number))
        writer.put(second[-1], content(spec(), second[-1]))
    with SliceWriter(store, spec()) as writer:  # ends before a block: has nothing to keep
        writer.put(0, content(spec(), 0))
    (begun,) = unfinished(store.root)
    assert len(begun[1].blocks) == 1
    held = store.inventory(spec())
    assert [n for n, digest in enumerate(held) if digest != NO_DIGEST] == first
    (shown,) = store.unusable()
    assert shown.reason.startswith("unfinished: 1 of ")
    with SliceWriter(store, spec(), held) as writer:
        assert writer.new_bytes == sum(map(file_bytes, spec().blocks[1:]))  # the other is a link
        fill(writer)
        written = writer.commit()
    assert written.manifest.digests == put(SliceStore(store.root / "other")).manifest.digests
    assert list(unfinished(store.root)) == []
    written.verify()


def test_a_few_unfinished_slices_are_kept_and_can_be_removed(store: SliceStore) -> None:
    for number in range(6):
        begin(store, spec(fingerprint=f"{number}" * 32), 2)
    store.index(spec())
    assert len(store.unusable()) == 4
    for each in store.unusable():
        store.remove(each)
    assert list(store.root.iterdir()) == []


def test_an_index_reads_each_record_once(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(store, spec(), 2)
    read, times = unfinished_module.read_regular, []

    def counted(*arguments: Any) -> bytes:
        times.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(unfinished_module, "read_regular", counted)
    assert any(digest != NO_DIGEST for digest in store.inventory(spec()))
    assert len(times) == 1


def test_the_longest_of_one_slice_is_kept_for_a_week(store: SliceStore) -> None:
    for blocks in (1, 3, 2):
        begin(store, spec(), blocks)
    store.index(spec())
    ((folder, manifest),) = unfinished(store.root)
    assert len(manifest.blocks) == 3
    then = time.time() - 8 * 86_400
    os.utime(folder / "record.jsonl", (then, then))
    store.index(spec())
    assert list(unfinished(store.root)) == []


def test_a_changed_byte_of_an_unfinished_slice_is_found_once(store: SliceStore) -> None:
    begin(store, spec(), 2)
    ((folder, manifest),) = unfinished(store.root)
    with open(folder / manifest.blocks[1].file, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(DamagedSliceError):
        put(store, kept=store.inventory(spec()))
    assert [len(each.blocks) for _, each in unfinished(store.root)] in ([], [1])
    put(store, kept=store.inventory(spec())).verify()


def test_what_a_writer_takes_units_from_is_not_removed(store: SliceStore) -> None:
    begin(store, spec(), 2)
    with SliceWriter(store, spec(), store.inventory(spec())) as writer:
        (each,) = store.unusable()
        with pytest.raises(StoreError, match="uses it"):
            store.remove(each)
        put(store)  # the same slice, by another writer
        fill(writer)
        writer.commit()
    assert list(unfinished(store.root)) == []


@pytest.mark.parametrize("record", ["", "{}\n", "no JSON\n", "[1]\n{}\n"])
def test_a_record_that_cannot_be_read_is_no_unfinished_slice(
    store: SliceStore, record: str
) -> None:
    for name in (".partial-x-1", f"{PREFIX}x-1"):
        (store.root / name).mkdir(parents=True)
        (store.root / name / "record.jsonl").write_text(record)
    assert set(store.inventory(spec())) == {NO_DIGEST}
    assert leftovers(store) == []
    assert store.unusable() == []


def test_error_within_leaves_nothing(store: SliceStore) -> None:
    class LeftError(Exception):
        pass

    def leave() -> None:
        with SliceWriter(store, spec()) as writer:
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
writer = t.SliceWriter(t.SliceStore(Path({root!r})), t.spec())
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


def test_whole_blocks_of_a_process_that_was_killed_are_taken_over(store: SliceStore) -> None:
    code = CRASH.format(tests=str(Path(__file__).parent), root=str(store.root), point="rename")
    assert run_python("-c", code, timeout_s=60).returncode == 9
    assert set(store.inventory(spec())) == {NO_DIGEST}  # the record ends before the slice is one
    code = code.replace("t.fill(writer)", "t.fill(writer), writer._finish_before(3), os._exit(9)")
    assert run_python("-c", code, timeout_s=60).returncode == 9
    held = store.inventory(spec())
    assert [digest != NO_DIGEST for digest in held] == [b < 3 for b, _ in spec().places]


@pytest.mark.parametrize("point", ["amid", "fsync", "rename"])
def test_crash_is_as_if_nothing_had_been(store: SliceStore, point: str) -> None:
    code = CRASH.format(tests=str(Path(__file__).parent), root=str(store.root), point=point)
    assert run_python("-c", code, timeout_s=60).returncode == 9
    assert leftovers(store) != []
    assert store.slices() == []
    put(store)  # the next writer sweeps up
    assert leftovers(store) == []
    assert len(store.slices()) == 1


def test_writers_at_work_are_not_swept_up(store: SliceStore) -> None:
    with SliceWriter(store, spec()) as first:
        put(store, spec(fingerprint="e" * 32))
        fill(first)
        first.commit()
    assert len(store.slices()) == 2


LIVING = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_store as t
with t.SliceWriter(t.SliceStore(Path({root!r})), t.spec()) as writer:
    print("writing", flush=True)
    sys.stdin.read()
    t.fill(writer)
    writer.commit()
"""


def test_a_writer_whose_process_number_says_nothing_is_not_swept_up(store: SliceStore) -> None:
    """In another PID namespace or on another host; what tells is the lock."""
    code = LIVING.format(tests=str(Path(__file__).parent), root=str(store.root))
    with killed_at_exit(
        start_python("-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        (partial,) = store.root.glob(".partial-*")
        assert str(other.pid) not in partial.name
        put(store, spec(0, 2))
        assert partial.exists()
        other.communicate("go on", timeout=60)
    assert other.returncode == 0
    assert len(store.slices()) == 2


def test_records_of_two_processes_with_one_number_do_not_mix(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two containers that share a store."""
    replaced, path = os.replace, store.root / "record.json"
    store.root.mkdir(parents=True)

    def replace(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "replace", replaced)
        write_atomically(path, "another's, which is longer")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_atomically(path, "ours")
    assert path.read_text() == "ours"
    assert leftovers(store) == []


def test_exclusive_locks_are_of_files_open_for_writing(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses others, and excludes nobody through a folder."""
    locked, flock = [], fcntl.flock

    def noted(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_EX:
            mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
            locked.append((stat.S_ISREG(os.fstat(descriptor).st_mode), mode))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", noted)
    store.remove(put(store))
    assert set(locked) == {(True, os.O_RDWR)}
    assert len(locked) == 2


# -- refused -----------------------------------------------------------------------------------


def test_chunks_out_of_order_are_refused(store: SliceStore) -> None:
    planned = spec()
    with SliceWriter(store, planned) as writer:
        writer.write(3, 0, content(planned, 3)[:5])
        for number, offset in ((3, 0), (3, 6), (4, 0), (0, 0)):
            with pytest.raises(StoreError, match="out of order"):
                writer.write(number, offset, b"def")
        writer.write(3, 5, content(planned, 3)[5:])
        for number, offset in ((3, 0), (2, 1), (-1, 0), (10_000, 0)):
            with pytest.raises(StoreError, match="out of order"):
                writer.write(number, offset, b"def")
        with pytest.raises(StoreError, match=r"ends early: layers\.0\.input_layernorm"):
            writer.commit()


def test_kept_units_are_not_written(store: SliceStore) -> None:
    put(store)
    with SliceWriter(store, spec(), store.inventory(spec())) as writer:
        assert writer.lacking == []
        with pytest.raises(StoreError, match="out of order"):
            writer.write(0, 0, b"x")


def test_too_many_bytes_are_refused(store: SliceStore) -> None:
    planned = spec()
    with (
        SliceWriter(store, planned) as writer,
        pytest.raises(StoreError, match="more than 64 bytes"),
    ):
        writer.write(0, 0, bytes(content(planned, 0)) + b"x")


def test_a_finished_block_cannot_be_changed(store: SliceStore) -> None:
    planned = spec()
    with SliceWriter(store, planned) as writer:
        later = next(n for n, (block, _) in enumerate(planned.places) if block == 1)
        for number in range(later + 1):
            writer.put(number, content(planned, number))
        with pytest.raises(StoreError, match="written already"):
            writer.put(0, content(planned, 0))
        with pytest.raises(StoreError, match="out of order"):
            writer.write(0, 0, b"x")


def test_manifest_round_trip_and_no_other_format(store: SliceStore) -> None:
    written = put(store).manifest
    text = written.to_json()
    assert Manifest.from_json(text) == written
    assert Manifest.from_json(text.encode()) == written
    for version in (4, 6, "5", None):
        with pytest.raises(StoreError, match=f"format {version!r}, this tpirt reads 5"):
            Manifest.from_json(json.dumps({**json.loads(text), "format_version": version}))


def spoilt(good: dict[str, Any]) -> Iterator[Any]:
    yield pytest.param("", id="empty")
    yield pytest.param("[]", id="list")
    yield pytest.param("null", id="null")
    yield pytest.param("[" * 100_000, id="deep")
    yield pytest.param(json.dumps(good)[:-30], id="cut")
    for key in good:
        yield pytest.param(json.dumps({k: v for k, v in good.items() if k != key}), id=key)
    yield pytest.param(json.dumps({**good, "more": 1}), id="more")
    for name, change in {
        "no spans": {"first": True},
        "beyond": {**good["shard"], "columns": [0, 257]},
        "empty": {**good["shard"], "columns": [8, 8]},
        "floats": {**good["shard"], "q_heads": [0.0, 1.0]},
        "list": [],
    }.items():
        yield pytest.param(json.dumps({**good, "shard": change}), id=f"shard {name}")
    for size in ("num_hidden_layers", "intermediate_size", "vocab_size"):
        config = {**good["config"], size: 1 << 30}
        yield pytest.param(json.dumps({**good, "config": config}), id=f"huge {size}")


ORDER = json.loads(SliceOrder(spec(), [NO_DIGEST] * len(spec().places)).to_json())


@pytest.mark.parametrize("text", list(spoilt(ORDER)))
def test_wrong_orders_are_refused(text: str) -> None:
    with pytest.raises(StoreError, match="slice manifest"):
        SliceOrder.from_json(text)


def test_orders_and_their_bounds() -> None:
    order = SliceOrder(spec(), [NO_DIGEST] * len(spec().places))
    assert SliceOrder.from_json(order.to_json()) == order
    with pytest.raises(StoreError, match="expected at most"):
        SliceOrder.from_json(" " * (MAX_ORDER_BYTES + 1))
    for digests in ("00", "zz", order.to_json(), 3, None):
        with pytest.raises(StoreError, match="digests"):
            SliceOrder.from_json(json.dumps({**ORDER, "digests": digests}))


def test_edited_manifest_is_refused(store: SliceStore) -> None:
    good = json.loads(put(store).manifest.to_json())
    for change in ({"blocks": good["blocks"][:-1]}, {"slice_id": "0" * 24}, {"blocks": 3}):
        with pytest.raises(StoreError, match="slice manifest"):
            Manifest.from_json(json.dumps({**good, **change}))
    good["blocks"][0]["digests"] = "00" * 16
    with pytest.raises(StoreError, match="not those of its model and shard"):
        Manifest.from_json(json.dumps(good))


def test_damage_is_found_named_and_mended(store: SliceStore) -> None:
    written = put(store)
    slice_id = written.manifest.slice_id
    file = written.block_path(1)
    good = file.read_bytes()
    for bad, reason in ((good[:-1], "expected"), (good + b"x", "expected"), (None, "No such file")):
        if bad is None:
            file.unlink()
        else:
            file.write_bytes(bad)
        with pytest.raises(StoreError, match=rf"layers\.0\.mlp\.safetensors.*{reason}"):
            store.find(slice_id)
    inventory = store.inventory(spec())
    block = {
        index
        for index, (digest, place) in enumerate(zip(inventory, spec().places, strict=True))
        if digest == NO_DIGEST or place[0] == 1
    }
    assert block == {n for n, digest in enumerate(inventory) if digest == NO_DIGEST}
    assert put(store, kept=inventory) == written
    written.verify()
    (written.path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        store.find(slice_id)
    assert put(store) == written


def test_commit_over_a_slice_in_use_changes_nothing_of_it(store: SliceStore) -> None:
    written = put(store)
    with open(written.block_path(0), "rb") as file:
        before = file.read()
        put(store)
        put(store, seed="another content")
        file.seek(0)
        assert file.read() == before
    assert written.block_path(0).read_bytes() == before


def test_slices_of_the_older_format_are_listed_and_removable(store: SliceStore) -> None:
    old = store.root / ("ab" * 12)
    old.mkdir(parents=True)
    fields = {"format_version": 2, "slice_id": old.name, "model": "m", "blocks": []}
    (old / "manifest.json").write_text(json.dumps(fields))
    foreign = store.root / "web"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "an application"}')
    assert store.slices() == []
    (found,) = store.unusable()
    assert (found.path, found.model, found.outdated) == (old, "m", True)
    assert "older tpirt" in found.reason
    store.remove(store.matching(["abab"])[0])
    assert not old.exists()
    assert foreign.exists()


# -- disks -------------------------------------------------------------------------------------


def nbytes() -> int:
    return spec().nbytes


def test_too_small_a_disk_is_refused_before_writing(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Usage(1 << 40, nbytes() - 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"the slice needs [\d,]+ bytes.*free"):
        SliceWriter(store, spec())
    assert leftovers(store) == []


@pytest.mark.parametrize(("total", "reserve"), [(20 << 20, 1 << 20), (1 << 50, 1 << 30)])
def test_a_part_of_the_disk_stays_free(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch, total: int, reserve: int
) -> None:
    for spare in (0, -1):
        usage = Usage(total, nbytes() + reserve + spare)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, usage=usage: usage)
        if spare:
            with pytest.raises(StoreError, match=rf"{reserve:,} of them stay free"):
                put(store, spec(fingerprint="e" * 32))
        else:
            put(store)


def test_store_limit(store: SliceStore) -> None:
    first = put(store, spec(0, 1))
    bounded = SliceStore(store.root, store.bytes_used() + 3 * nbytes() // 2)
    put(bounded, spec(1, 2))  # nothing is kept: all of it is new
    with pytest.raises(StoreError, match=r"limit of .* in use.*--store-limit"):
        put(bounded, spec(0, 2, fingerprint="e" * 32))
    bounded.remove(first)
    put(bounded, spec(0, 2, fingerprint="e" * 32))
    with pytest.raises(StoreError, match=r"may have .*--store-limit"):
        put(SliceStore(store.root, 100), spec(0, 2, fingerprint="e" * 32))


def aged(stored: StoredSlice, hours: float) -> StoredSlice:
    """The same, used last so long ago."""
    then = time.time() - 3600 * hours
    os.utime(stored.path / MANIFEST, (then, then))
    return stored


def test_what_was_not_used_for_longest_gives_way_and_never_what_is_used(
    store: SliceStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tpirt")
    used, oldest, older, newest = (
        aged(put(store, spec(0, 1, fingerprint=str(hours) * 32)), hours) for hours in (4, 3, 2, 1)
    )
    begin(store, spec(1, 2), 2)
    held = aged(used, 4).hold()
    aged(used, 4)
    bounded = SliceStore(store.root, store.bytes_used())
    new = put(bounded, spec(0, 1))
    assert set(bounded.slices()) == {used, older, newest, new}
    assert oldest not in bounded.slices()
    assert bounded.unusable() == []
    (message,) = [m for m in caplog.messages if "last used on" in m]
    assert message.startswith(f"removed {oldest.path} (m, last used on 20")
    held.release()


def test_slices_give_way_without_a_walk_for_each(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        aged(put(store, spec(1, 2, fingerprint=str(number) * 32)), number + 1)
    begin(store, spec(0, 2), 2)
    limit, bytes_used, walks = store.bytes_used(), SliceStore.bytes_used, []

    def counted(self: SliceStore) -> int:
        walks.append(self)
        return bytes_used(self)

    monkeypatch.setattr(SliceStore, "bytes_used", counted)
    bounded = SliceStore(store.root, limit)
    bounded.promise(2 * nbytes(), of_slice=True)
    assert len(bounded.slices()) < 3
    assert bounded.unusable() == []
    assert len(walks) == 2  # before, and after


def test_what_is_broken_is_listed_and_gives_way_first(store: SliceStore) -> None:
    old, broken = aged(put(store, spec(0, 1)), 5), put(store, spec(0, 1, fingerprint="e" * 32))
    (broken.path / MANIFEST).unlink()
    (shown,) = store.unusable()
    assert (shown.path, shown.reason) == (broken.path, "damaged: its manifest is missing")
    assert store.matching([broken.path.name]) == [shown]
    bounded = SliceStore(store.root, store.bytes_used())
    new = put(bounded, spec(0, 1, fingerprint="d" * 32))
    assert bounded.slices() == sorted([old, new], key=lambda each: each.path)
    assert bounded.unusable() == []


def test_a_last_use_in_the_future_is_an_old_one(store: SliceStore) -> None:
    """By a clock that was wrong."""
    put_before = aged(put(store, spec(0, 1)), -9000)
    new = put(SliceStore(store.root, store.bytes_used()), spec(0, 1, fingerprint="e" * 32))
    assert store.slices() == [new] != [put_before]


def test_sources_of_a_slice_do_not_give_way_to_it(store: SliceStore) -> None:
    old = aged(put(store, spec(0, 1)), 5)
    bounded = SliceStore(store.root, store.bytes_used())
    with pytest.raises(StoreError, match="in use"):
        put(bounded, spec(0, 2), kept=bounded.inventory(spec(0, 2)))
    assert bounded.slices() == [old]


def test_full_disk_amid_writing(store: SliceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with SliceWriter(store, spec()) as writer, monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            fill(writer)
    assert leftovers(store) == []
    assert store.slices() == []


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
    usage = Usage(1 << 40, 1 << 40)  # somebody else fills it meanwhile
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    store = SliceStore(tiny_disk)
    with SliceWriter(store, spec(0, 1)) as writer, pytest.raises(StoreError, match="No space left"):
        fill(writer)
    assert leftovers(store) == []


def test_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(StoreError, match=r"expected a folder, but .*/file is a file"):
            SliceStore(root)
    (tmp_path / "link").symlink_to(tmp_path / "unplugged")
    with pytest.raises(StoreError, match=r"expected a folder, but .*/link links to nowhere"):
        SliceStore(tmp_path / "link" / "folder")


def test_disk_without_hard_links(store: SliceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    put(store, spec(0, 1))
    monkeypatch.setattr(module.os, "link", refuse)
    wanted = dataclasses.replace(spec(0, 1), model="renamed")
    again = put(store, wanted, kept=store.inventory(wanted))
    again.verify()
    assert leftovers(store) == []


def test_file_systems_that_lack_what_disks_have(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SMB, FUSE: no permissions, no flush of folders, no direct reads, no size."""
    opened, synced = os.open, os.fsync

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def open_(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            refuse()
        return opened(path, flags, *mode)

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        synced(descriptor)

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(0, 0))
    put(store).verify()
    assert leftovers(store) == []


def test_direct_read_that_fails_is_repeated_through_the_page_cache(
    store: SliceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, read = put(store), os.preadv

    def preadv(handle: int, *arguments: Any) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return read(handle, *arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    written.verify()


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_store() == Path("/somewhere/tpirt/slices")
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_store() == tmp_path / ".cache/tpirt/slices"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without a home directory; returns the folder that takes its place."""

    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"tpirt-{os.getuid()}"


def test_place_without_a_home_directory(homeless: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert default_store() == homeless / "slices"
    assert homeless.stat().st_mode & 0o077 == 0
    (warning,) = caplog.messages
    assert "no home directory" in warning
    assert f"{homeless / 'slices'}; give --store DIR" in warning
    assert default_store() == homeless / "slices"  # and again, now that it is there


def test_place_with_a_home_directory_that_cannot_be_written_to(
    homeless: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a container's ``HOME=/`` for a user other than root."""
    monkeypatch.setenv("HOME", str(tmp_path / "root"))
    monkeypatch.setattr(os, "access", lambda path, _: not tmp_path.is_relative_to(path))
    assert default_store() == homeless / "slices"


def test_place_with_a_home_directory_that_is_none(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``HOME=/dev/null`` of some system users."""
    monkeypatch.setenv("HOME", os.devnull)
    assert default_store() == homeless / "slices"


@pytest.mark.parametrize("trap", ["a link", "writable by all"])
def test_folder_that_another_user_prepared_is_refused(
    homeless: Path, tmp_path: Path, trap: str
) -> None:
    if trap == "a link":
        (tmp_path / "theirs").mkdir()
        homeless.symlink_to(tmp_path / "theirs")
    else:
        homeless.mkdir()
        homeless.chmod(0o777)
    with pytest.raises(StoreError, match=r"not this user's own; give --store"):
        default_store()


def test_a_folder_whose_lock_was_deleted_is_swept_up(store: SliceStore) -> None:
    lost = store.root / ".partial-lost-1234"
    lost.mkdir(parents=True)
    (lost / "5678").touch()
    with SliceWriter(store, spec()) as writer:
        assert not lost.exists()
        assert writer.lacking
        remove_leftovers(store.root)
        assert len(leftovers(store)) == 2  # the writer's own folder and lock
