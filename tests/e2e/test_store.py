"""``tpirt store`` and ``tpirt eval`` through the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tpirt.cli.main import main
from tpirt.testing.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("store") / "tiny")


@pytest.fixture
def store(model: Path, tmp_path: Path) -> Path:
    split = ["split", "--model", str(model), "--world-size", "2", "--out", str(tmp_path), "--quiet"]
    assert main(split) == 0
    assert main([*split, "--quantize", "int8"]) == 0
    return tmp_path / "rank0"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list_verify_remove(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "store", "ls", "--store", str(store))
    _, *slices, total = out.splitlines()
    assert code == 0
    assert len(slices) == 2
    assert str(store) in total
    assert {line.split()[2] for line in slices} == {"float32", "int8"}
    first, second = (line.split()[0] for line in slices)
    code, out, _ = run(capsys, "store", "verify", "--store", str(store))
    assert (code, out.count("good")) == (0, 2)

    code, out, _ = run(capsys, "store", "rm", first[:8], "--store", str(store))
    assert code == 0
    assert not list(store.glob(f"{first}*"))
    (second,) = (path.name for path in store.glob(f"{second}*"))
    code, _, err = run(capsys, "store", "rm", "0000", "--store", str(store))
    assert code == 2
    assert "no slice '0000'" in err

    (store / second / "manifest.json").write_text("{")
    assert run(capsys, "store", "rm", "--store", str(store))[0] == 2
    assert (store / second).exists()
    code, out, _ = run(capsys, "store", "rm", "--unusable", "--store", str(store))
    assert (code, out.count("removed")) == (0, 1)
    assert not (store / second).exists()


def test_flipped_bit_is_found_and_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = sorted(store.glob("*/layers.1.mlp.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[-7] ^= 4
    victim.write_bytes(content)
    code, out, err = run(capsys, "store", "verify", "--store", str(store))
    assert code == 2
    assert str(victim) in err
    assert "checksum" in err
    assert out.count("good") == 1


def test_eval(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("Pack my box with five dozen liquor jugs. " * 10, encoding="utf-8")
    figures = []
    for extra in ([], ["--quantize", "int8"]):
        code, out, _ = run(
            capsys,
            *("eval", "--model", str(model), "--text", str(text), "--context", "64"),
            *("--store", str(tmp_path / "slices"), "--quiet", "--json", *extra),
        )
        assert code == 0
        figures.append(json.loads(out))
    assert figures[0]["tokens"] == figures[1]["tokens"] > 300
    # A random model's loss is no smaller than that of guessing among all tokens alike.
    assert math.log(figures[0]["perplexity"]) > math.log(200)
    assert figures[1]["perplexity"] == pytest.approx(figures[0]["perplexity"], rel=0.05)
    assert figures[1]["perplexity"] != figures[0]["perplexity"]


def test_eval_of_no_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none"
    code, _, err = run(capsys, "eval", "--model", str(model), "--text", str(missing))
    assert code == 2
    assert str(missing) in err
