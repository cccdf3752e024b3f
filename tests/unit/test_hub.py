"""Model directories by name, and names of model directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tpirt.engine.model import open_model
from tpirt.errors import CheckpointError
from tpirt.testing.models import make_model
from tpirt.weights.hub import find_model, model_name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache of a user who has set nothing; the current folder is empty."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / ".cache" / "huggingface" / "hub"


def snapshot(cache: Path, commit: str, name: str = "models--Org--Tiny-1B") -> Path:
    path = cache / name / "snapshots" / commit
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_the_snapshot_of_main(cache: Path) -> None:
    older, newer = snapshot(cache, "1" * 40), snapshot(cache, "0" * 40)
    os.utime(older, (1, 1))
    assert find_model("Org/Tiny-1B") == newer
    (older.parent.parent / "refs").mkdir()
    (older.parent.parent / "refs" / "main").write_text("1" * 40)
    assert find_model("Org/Tiny-1B") == older
    assert model_name(older) == "Tiny-1B"


@pytest.mark.parametrize(
    ("variable", "value", "hub"),
    [
        ("HF_HUB_CACHE", "a", "a"),
        ("HF_HOME", "a", "a/hub"),
        ("XDG_CACHE_HOME", "a", "a/huggingface/hub"),
    ],
)
def test_where_the_cache_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, hub: str
) -> None:
    home = cache.parents[2]
    monkeypatch.setenv(variable, str(home / value))
    path = snapshot(home / hub, "2" * 40)
    assert find_model("Org/Tiny-1B") == path


def test_a_local_path_comes_first(cache: Path) -> None:
    snapshot(cache, "1" * 40)
    Path("Org/Tiny-1B").mkdir(parents=True)
    assert find_model("Org/Tiny-1B") == Path("Org/Tiny-1B")


def test_a_name_that_is_nowhere(cache: Path) -> None:
    (cache / "models--Org--Tiny-1B" / "snapshots" / "1").mkdir(parents=True)  # only begun
    expected = r"hf download Org/Tiny-1B --local-dir Tiny-1B` \(needed are config\.json, .*\)"
    with pytest.raises(CheckpointError, match=expected):
        find_model("Org/Tiny-1B")


def test_the_address_of_its_page(cache: Path) -> None:
    path = snapshot(cache, "1" * 40)
    assert find_model("https://huggingface.co/Org/Tiny-1B/tree/main") == path
    with pytest.raises(CheckpointError, match="hf download Org/Other --local-dir Other"):
        find_model("https://huggingface.co/Org/Other")


def test_names(tmp_path: Path) -> None:
    for folder, name in (
        ("llama", "llama"),
        ("models--Org--A--b/snapshots/0123", "A--b"),
        ("models--gpt2/snapshots/0123", "gpt2"),
        ("snapshots/0123", "0123"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        assert model_name(tmp_path / folder) == name


def test_other_formats(tmp_path: Path) -> None:
    file = tmp_path / "tiny-q4.gguf"
    file.write_bytes(b"GGUF")
    for model in (file, tmp_path):
        with pytest.raises(CheckpointError, match=r"GGUF is not supported.* --quantize int4"):
            find_model(model)
    file.rename(tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth; tpirt reads .*safetensors"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_model(tmp_path / "config.json") == find_model(tmp_path) == tmp_path


@pytest.mark.parametrize("stated", ["auto", None])
def test_a_dtype_that_is_not_stated_is_that_of_the_weights(
    tmp_path: Path, stated: str | None
) -> None:
    model = make_model(tmp_path, dtype=torch.bfloat16)
    text = (model / "config.json").read_text()
    for key in ("dtype", "torch_dtype"):
        unstated = '"unused": 0' if stated is None else f'"{key}": "{stated}"'
        (model / "config.json").write_text(text.replace('"dtype": "bfloat16"', unstated))
        opened = open_model(model)
        opened.checkpoint.close()
        assert opened.config.dtype == "bfloat16"
