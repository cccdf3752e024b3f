"""The checkpoint reader: every range equals slicing, every damage is named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpirt.config import ModelConfig
from tpirt.dtypes import SAFETENSORS_NAMES
from tpirt.errors import CheckpointError
from tpirt.weights import checkpoint as module
from tpirt.weights import fingerprint as notes
from tpirt.weights.checkpoint import Checkpoint, check_tensors, read_header, resolve_tied
from tpirt.weights.names import expected_tensors

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
}


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a safetensors file, by the format's description."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return raw_file(path, header, data)


def save_shards(path: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for file, tensors in shards.items():
        save(path / file, tensors)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def model_tensors(**changes: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(ModelConfig.from_hf(CONFIG | changes))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def model_dir(path: Path, tensors: Mapping[str, torch.Tensor], **changes: Any) -> ModelConfig:
    save(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return ModelConfig.from_dir(path)


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SAFETENSORS_NAMES, ids=str)
def test_reads_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(4 * 3 * 8 * dtype.itemsize, dtype=torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    tensor = raw.view(dtype).view(-1, 8)
    save(tmp_path / "model.safetensors", {"odd": torch.ones(3, dtype=torch.uint8), "t": tensor})
    with Checkpoint.open(tmp_path) as checkpoint:
        got = checkpoint.read("t")
    assert got.dtype == dtype
    assert got.shape == tensor.shape
    assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]))
    rows, columns = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    tensor = torch.arange(rows * columns).reshape(rows, columns).to(dtype)
    row_range = sorted(draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    column_range = sorted(draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
    return tensor, (row_range[0], row_range[1]), (column_range[0], column_range[1])


@given(
    matrix=matrices(),
    skip_bytes=st.sampled_from([1, 16, 4096]),
    piece_bytes=st.sampled_from([1, 100, 4 << 20]),
    call_bytes=st.sampled_from([1, 7, 1 << 28]),
    picks=st.lists(st.integers(0, 1000), max_size=5),
)
@settings(deadline=None)
def test_ranges_equal_slices(
    tmp_path_factory: pytest.TempPathFactory,
    matrix: tuple[torch.Tensor, tuple[int, int], tuple[int, int]],
    skip_bytes: int,
    piece_bytes: int,
    call_bytes: int,
    picks: list[int],
) -> None:
    tensor, rows, columns = matrix
    path = tmp_path_factory.mktemp("model")
    save(path / "model.safetensors", {"pad": torch.zeros(3, dtype=torch.uint8), "t": tensor})
    with pytest.MonkeyPatch.context() as patch, Checkpoint.open(path) as checkpoint:
        patch.setattr(module, "_SKIP_BYTES", skip_bytes)
        patch.setattr(module, "_ROWS_BYTES", piece_bytes)
        patch.setattr(module, "_READ_BYTES", call_bytes)
        assert torch.equal(checkpoint.read("t"), tensor)
        assert torch.equal(checkpoint.read_rows("t", *rows), tensor[slice(*rows)])
        block = checkpoint.read_columns("t", *rows, *columns)
        assert torch.equal(block, tensor[slice(*rows), slice(*columns)])
        picked = [pick % len(tensor) for pick in picks if len(tensor)]
        assert torch.equal(checkpoint.gather_rows("t", picked), tensor[picked])


def test_rows_are_gathered_without_a_wait_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(5, 3)
    save(tmp_path / "model.safetensors", {"t": tensor})
    with Checkpoint.open(tmp_path) as checkpoint:
        cached = checkpoint.gather_cached_rows("t", [4, 0])
        assert cached is None or torch.equal(cached, tensor[[4, 0]])  # None: on a tmpfs

        def refused(code: int, *_: object) -> int:
            raise OSError(code, os.strerror(code))

        for code in (errno.EAGAIN, errno.EOPNOTSUPP):
            monkeypatch.setattr(os, "preadv", partial(refused, code))
            assert checkpoint.gather_cached_rows("t", [4]) is None
            with pytest.raises(CheckpointError, match="t cannot be read"):
                checkpoint.gather_rows("t", [4])


def test_wide_columns_at_the_real_thresholds(tmp_path: Path) -> None:
    tensor = torch.arange(30 * 40_000).view(30, 40_000)  # rows of 320 kB, 13 of them a piece
    save(tmp_path / "model.safetensors", {"t": tensor})
    with Checkpoint.open(tmp_path) as checkpoint:
        for first, last in ((0, 40_000), (7, 39_990), (39_990, 40_000), (0, 1)):
            got = checkpoint.read_columns("t", 1, 29, first, last)
            assert torch.equal(got, tensor[1:29, first:last])


def test_rows_of_vectors_and_scalars(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"v": torch.arange(9), "s": torch.tensor(2.5)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read_rows("v", 2, 5).tolist() == [2, 3, 4]
        assert checkpoint.read("s").item() == 2.5
        with pytest.raises(CheckpointError, match="s: rows"):
            checkpoint.read_rows("s", 0, 1)


def test_reads_into_a_given_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(5, 3)
    save(tmp_path / "model.safetensors", {"t": tensor})
    out = torch.zeros(2, 3)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read_rows("t", 3, 5, out=out) is out
    assert torch.equal(out, tensor[3:])


@pytest.mark.parametrize(
    "read",
    [
        lambda c: c.read("absent"),
        lambda c: c.read_rows("t", -1, 2),
        lambda c: c.read_rows("t", 3, 2),
        lambda c: c.read_rows("t", 0, 6),
        lambda c: c.read_columns("t", 0, 5, 0, 4),
        lambda c: c.read_columns("t", 0, 6, 0, 3),
        lambda c: c.read_columns("v", 0, 1, 0, 1),
        lambda c: c.gather_rows("t", [0, 5]),
        lambda c: c.gather_rows("t", [-1]),
        lambda c: c.gather_rows("v", [0]),
    ],
)
def test_refuses_what_is_not_there(tmp_path: Path, read: Callable[[Checkpoint], object]) -> None:
    save(tmp_path / "model.safetensors", {"t": torch.randn(5, 3), "v": torch.randn(5)})
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError):
        read(checkpoint)


def test_threads_read_at_once(tmp_path: Path) -> None:
    tensor = torch.randn(64, 32)
    save(tmp_path / "model.safetensors", {"t": tensor})
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(100):
            start = (seed * 7 + step) % 60
            if not torch.equal(checkpoint.read_rows("t", start, start + 4), tensor[start:][:4]):
                wrong.append(start)

    with Checkpoint.open(tmp_path) as checkpoint:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_closes_its_files(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    save_shards(tmp_path, {f"{i}.safetensors": {f"t{i}": torch.ones(2)} for i in range(5)})
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="t0: read after close"):
        checkpoint.read("t0")
    (tmp_path / "4.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)
    assert len(os.listdir("/dev/fd")) == before


def test_truncated_while_open(tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors", {"t": torch.randn(100, 10)})
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(file, file.stat().st_size - 100)
        checkpoint.read_rows("t", 0, 50)
        reads: list[Callable[[], object]] = [
            lambda: checkpoint.read("t"),
            lambda: checkpoint.read_columns("t", 0, 100, 3, 5),
            lambda: checkpoint.gather_rows("t", [99]),
        ]
        for read in reads:
            with pytest.raises(CheckpointError, match="t: the file was truncated") as caught:
                read()
            assert str(file) in str(caught.value)


def test_read_failure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    save(tmp_path / "model.safetensors", {"t": torch.randn(2)})
    with Checkpoint.open(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=r"t cannot be read \(Input/output error\)"):
            checkpoint.read("t")


# -- files -------------------------------------------------------------------------------------


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"b": torch.randn(3, 4).bfloat16(), "a": torch.randn(7), "empty": torch.ones(0, 3)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_one_file_of_another_name(tmp_path: Path) -> None:
    save(tmp_path / "weights.safetensors", {"t": torch.ones(2)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["t"]


def test_shards(tmp_path: Path) -> None:
    shards = {"1.safetensors": {"a": torch.randn(2, 2)}, "2.safetensors": {"b": torch.randn(3)}}
    save_shards(tmp_path, shards)
    with Checkpoint.open(tmp_path) as checkpoint:
        for tensors in shards.values():
            for name, tensor in tensors.items():
                assert torch.equal(checkpoint.read(name), tensor)


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[object, int, list[str]]] = {
    "not JSON": (b"{'a': 1}", 0, ["header is not valid JSON"]),
    "not UTF-8": (b"\xff\xfe{}", 0, ["header is not valid JSON"]),
    "nested": (b"[" * 100_000, 0, ["header is not valid JSON"]),
    "list": ([], 0, ["header", "JSON object"]),
    "entry is a number": ({"t": 3}, 0, ["t: expected", "got 3"]),
    "twice": (b'{"t": {}, "t": {}}', 0, ["t: listed twice"]),
    "unknown dtype": ({"t": entry([1], 0, 4, "Q4")}, 4, ["t: dtype", "'Q4'", "BF16"]),
    "no dtype": ({"t": {"shape": [1], "data_offsets": [0, 4]}}, 4, ["t: dtype", "None"]),
    "list dtype": ({"t": entry([1], 0, 4, ["F32"])}, 4, ["t: dtype"]),
    "no shape": ({"t": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, ["t: shape", "None"]),
    "negative shape": ({"t": entry([-1], 0, 4)}, 4, ["t: shape", "[-1]"]),
    "fraction": ({"t": entry([1.0], 0, 4)}, 4, ["t: shape", "[1.0]"]),
    "true": ({"t": entry([True], 0, 4)}, 4, ["t: shape"]),
    "no offsets": ({"t": {"dtype": "F32", "shape": [1]}}, 4, ["t: data_offsets"]),
    "one offset": ({"t": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}, 0, ["[0]"]),
    "backwards": ({"t": entry([1], 4, 0)}, 4, ["t: data_offsets", "[4, 0]"]),
    "negative offset": ({"t": entry([1], -4, 0)}, 4, ["t: data_offsets", "-4"]),
    "huge offset": ({"t": entry([1], 2**70, 2**70 + 4)}, 4, ["t: data_offsets"]),
    "wrong size": ({"t": entry([2], 0, 4)}, 4, ["t: size of F32 (2,)", "8 bytes", "got 4"]),
    "overflowing shape": ({"t": entry([2**62, 4], 0, 0)}, 0, ["t: size"]),
    "beyond the file": ({"t": entry([2], 0, 8)}, 4, ["t: file is truncated", "bytes"]),
    "hole at the start": ({"t": entry([1], 4, 8)}, 8, ["t: a hole"]),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, ["b: a hole"]),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8, ["b", "overlap", "a"]),
    "same place": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4, ["overlap"]),
    "longer": ({"t": entry([1], 0, 4)}, 9, ["longer than its header says"]),
    "only extra data": ({}, 1, ["longer than its header says"]),
}


@pytest.mark.parametrize(("header", "data_bytes", "words"), HEADERS.values(), ids=HEADERS)
def test_damaged_header(tmp_path: Path, header: object, data_bytes: int, words: list[str]) -> None:
    file = raw_file(tmp_path / "model.safetensors", header, bytes(data_bytes))
    for read in (lambda: read_header(file), lambda: Checkpoint.open(tmp_path)):
        with pytest.raises(CheckpointError) as caught:
            read()
        for word in [str(file), *words]:
            assert word in str(caught.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "git-lfs pointer.*git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "PyTorch .bin"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"<!DOCTYPE html>", "web page"),
        (b"", "too short"),
        (bytes(7), "too short"),
        (b"\xff" * 100, "header length"),
        ((100_000_001).to_bytes(8, "little") + bytes(100), "header length"),
        ((1000).to_bytes(8, "little") + bytes(100), "truncated within its header.*1008.*108"),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@given(data=st.binary(max_size=64), cut=st.integers(0, 300), place=st.integers(0, 299))
@settings(deadline=None)
def test_any_damage_is_our_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int, place: int
) -> None:
    path = tmp_path_factory.mktemp("model")
    file = save(path / "model.safetensors", {"a": torch.ones(3, 4), "b": torch.ones(5)})
    content = file.read_bytes()
    for damaged in (content[:cut], content[:place] + data + content[place + len(data) :], data):
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError), Checkpoint.open(path) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such model directory"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="got a file"):
        Checkpoint.open(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "no safetensors files; a model directory has"),
        (["config.json"], "no safetensors files;"),
        (["pytorch_model.bin"], "found only pytorch_model.bin; download .* docs/models.md"),
        (["model.gguf"], "found only model.gguf"),
        (["a.safetensors", "b.safetensors"], "2 safetensors files but neither"),
    ],
)
def test_no_weights(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path)


def test_denied_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    save(tmp_path / "model.safetensors", {"t": torch.ones(1)})
    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Permission denied.*chmod"):
        Checkpoint.open(tmp_path)
    monkeypatch.setattr(os, "listdir", deny)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("absent")])
def test_what_is_no_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not a regular file|no such file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"{", "index.json: not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "weight_map"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": {"a": 3}}', "a: expected a file name"),
        (b'{"weight_map": {"a": "../1.safetensors"}}', "a: expected a file name"),
        (b'{"weight_map": {"a": "9.safetensors"}}', "9.safetensors: missing shard"),
        (b'{"weight_map": {"x": "1.safetensors"}}', "x: expected in 1.safetensors, got no such"),
        (
            b'{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}',
            "a: expected in 2.safetensors, got 1.safetensors",
        ),
    ],
)
def test_damaged_index(tmp_path: Path, index: bytes, words: str) -> None:
    save_shards(
        tmp_path, {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}}
    )
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save_shards(
        tmp_path,
        {
            "1.safetensors": {"a": torch.ones(1), "c": torch.ones(1)},
            "2.safetensors": {"a": torch.ones(1), "b": torch.ones(1)},
        },
    )
    with pytest.raises(CheckpointError, match=r"2\.safetensors: a: also in 1\.safetensors"):
        Checkpoint.open(tmp_path)


# -- fingerprint -------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    with Checkpoint.open(path) as checkpoint:
        return checkpoint.fingerprint


def test_fingerprint_covers_content_not_its_packing(tmp_path: Path) -> None:
    tensors = model_tensors()
    model_dir(tmp_path, tensors)
    first = fingerprint(tmp_path)
    assert len(first) == 32
    assert set(first) <= set("0123456789abcdef")
    model_dir(tmp_path, tensors, transformers_version="9", num_key_value_heads=2)
    assert fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").unlink()
    half = len(tensors) // 2
    parts = list(tensors.items())
    save_shards(
        tmp_path, {"1.safetensors": dict(parts[half:]), "2.safetensors": dict(parts[:half])}
    )
    assert fingerprint(tmp_path) == first


def test_fingerprint_sees_changes(tmp_path: Path) -> None:
    tensors = model_tensors()
    model_dir(tmp_path, tensors)
    seen = {fingerprint(tmp_path)}
    model_dir(tmp_path, tensors, rope_theta=1.0)
    seen.add(fingerprint(tmp_path))
    for name in tensors:
        changed = {n: t.clone() for n, t in tensors.items()}
        changed[name].view(-1)[-1] += 1
        model_dir(tmp_path, changed)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 2 + len(tensors)


@pytest.mark.parametrize("index", [0, 12_345, 25_000, 49_999])
def test_fingerprint_covers_every_byte(tmp_path: Path, index: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensor = torch.zeros(50_000)
    save(tmp_path / "model.safetensors", {"t": tensor})
    before = fingerprint(tmp_path)
    tensor[index] = 1
    save(tmp_path / "model.safetensors", {"t": tensor})
    assert fingerprint(tmp_path) != before


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[str, int]]:
    """Fingerprint the model in ``tmp_path / "m"``: (fingerprint, bytes that were hashed)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(notes, "_SETTLED_NS", -1)  # these files are new
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save(folder / "model.safetensors", {"t": torch.zeros(512, 100), "u": torch.ones(7)})

    def hash_once() -> tuple[str, int]:
        done = [0]
        with Checkpoint.open(folder) as checkpoint:
            checkpoint.hash_content(lambda progress: done.append(progress.done))
            return checkpoint.fingerprint, max(done)

    return hash_once


def test_unchanged_files_are_not_hashed_again(
    hashed: Callable[[], tuple[str, int]], tmp_path: Path
) -> None:
    first, nbytes = hashed()
    assert nbytes == 4 * (512 * 100 + 7)
    assert hashed() == (first, 0)
    file = tmp_path / "m" / "model.safetensors"
    os.utime(file)  # touched
    assert hashed() == (first, nbytes)
    assert hashed() == (first, 0)
    shutil.copy2(file, tmp_path / "copy")  # copied: another inode
    (tmp_path / "copy").replace(file)
    assert hashed() == (first, nbytes)
    (note,) = (tmp_path / "cache").rglob("*.json")
    for rubbish in ("", "[]", "{}", note.read_text().replace('"digest": "', '"digest": "x')):
        note.write_text(rubbish)
        assert hashed() == (first, nbytes)


def test_edit_that_restores_size_and_mtime_is_noticed(
    hashed: Callable[[], tuple[str, int]], tmp_path: Path
) -> None:
    first, nbytes = hashed()
    file = tmp_path / "m" / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    with open(file, "r+b") as opened:  # 100 of 512 rows, in place
        opened.seek(len(content) - nbytes + 4 * 200 * 100)
        opened.write(b"\x01" * (4 * 100 * 100))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second, again = hashed()
    assert second != first
    assert again == nbytes


def test_hash_of_a_file_that_just_changed_is_not_remembered(
    hashed: Callable[[], tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the file system's clock, another change would not show."""
    monkeypatch.setattr(notes, "_SETTLED_NS", 3_600_000_000_000)
    first, nbytes = hashed()
    assert hashed() == (first, nbytes)


def test_fingerprint_needs_the_configuration(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"t": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        fingerprint(tmp_path)


# -- the model's tensors -----------------------------------------------------------------------


def check(path: Path, tensors: Mapping[str, torch.Tensor], **changes: Any) -> tuple[str, str]:
    config = model_dir(path, tensors, **changes)
    with Checkpoint.open(path) as checkpoint:
        check_tensors(checkpoint, config)
        return resolve_tied(checkpoint, config)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_complete_model(tmp_path: Path) -> None:
    assert check(tmp_path, model_tensors()) == (EMBEDDING, HEAD)


def test_base_model_names(tmp_path: Path) -> None:
    tensors = {name.removeprefix("model."): t for name, t in model_tensors().items()}
    assert check(tmp_path, tensors) == ("embed_tokens.weight", HEAD)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.prefix == ""
        assert checkpoint.source_name("norm.weight", HEAD) == "norm.weight"


def test_source_names(tmp_path: Path) -> None:
    model_dir(tmp_path, model_tensors())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.source_name("norm.weight", EMBEDDING) == "model.norm.weight"
        assert checkpoint.source_name("lm_head.weight", EMBEDDING) == EMBEDDING


def test_mixed_prefixes(tmp_path: Path) -> None:
    tensors = model_tensors()
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"prefix model. are mixed .*norm\.weight"):
        check(tmp_path, tensors)


def test_tied_embeddings(tmp_path: Path) -> None:
    tensors = model_tensors(tie_word_embeddings=True)
    assert check(tmp_path, tensors, tie_word_embeddings=True) == (EMBEDDING, EMBEDDING)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    assert check(tmp_path, tensors, tie_word_embeddings=True) == (HEAD, HEAD)
    tensors[EMBEDDING] = tensors[HEAD]
    assert check(tmp_path, tensors, tie_word_embeddings=True) == (EMBEDDING, HEAD)
    tensors[HEAD] = torch.ones(3, 3)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: expected \(20, 16\), got \(3, 3\)"):
        check(tmp_path, tensors, tie_word_embeddings=True)


def test_missing_embedding_or_head(tmp_path: Path) -> None:
    for name in (EMBEDDING, HEAD):
        tensors = {n: t for n, t in model_tensors().items() if n != name}
        with pytest.raises(CheckpointError, match=f"{name}: missing.*tie_word_embeddings is false"):
            check(tmp_path, tensors)
    tensors = {n: t for n, t in model_tensors().items() if n not in (EMBEDDING, HEAD)}
    with pytest.raises(CheckpointError, match=f"{EMBEDDING}: missing.*tie_word_embeddings is true"):
        check(tmp_path, tensors, tie_word_embeddings=True)


@pytest.mark.parametrize("name", [n for n in model_tensors() if n not in (EMBEDDING, HEAD)])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    tensors = {n: t for n, t in model_tensors().items() if n != name}
    with pytest.raises(CheckpointError, match=f"{name}: missing from the checkpoint"):
        check(tmp_path, tensors)


@pytest.mark.parametrize("name", model_tensors())
def test_wrong_shape(tmp_path: Path, name: str) -> None:
    tensors = model_tensors()
    right = tuple(tensors[name].shape)
    tensors[name] = torch.ones(*right[:-1], right[-1] + 1)
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path, tensors)
    assert f"{name}: expected {right}, got {tuple(tensors[name].shape)}" in str(caught.value)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float64, "save the model in float32"),
        (torch.int8, "quantized already"),
        (torch.float8_e4m3fn, "quantized already"),
    ],
)
def test_wrong_dtype(tmp_path: Path, dtype: torch.dtype, advice: str) -> None:
    tensors = model_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    with pytest.raises(CheckpointError, match=r"norm\.weight: expected float32, .*" + advice):
        check(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    check(tmp_path, {name: tensor.to(dtype) for name, tensor in model_tensors().items()})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.float32),
        ("model.rotary_emb.inv_freq", torch.float32),
        ("model.layers.0.self_attn.mask", torch.bool),
        ("position_ids", torch.int64),
        ("vision.patch.weight", torch.float32),
    ],
)
def test_harmless_extras(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    check(tmp_path, model_tensors() | {name: torch.ones(4, dtype=dtype)})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.sinks",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_dangerous_extras(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: in the checkpoint but unknown"):
        check(tmp_path, model_tensors() | {name: torch.ones(4)})


def test_counts_further_problems(tmp_path: Path) -> None:
    tensors = {n: t for n, t in model_tensors().items() if "layers.1." not in n}
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S+ \(and 8 more\): missing"):
        check(tmp_path, tensors)
