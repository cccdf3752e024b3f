"""bench.quality: which text a model is judged by, and the table's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import quality


@pytest.fixture
def library(tmp_path: Path) -> Path:
    names = [f"pack/m{number:02}.py" for number in range(30)] + ["a.py", "z.py", "notes.txt"]
    for name in [*names, "test/test_a.py", "site-packages/b.py", "pack/tests/c.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return tmp_path


def test_every_file_is_trained_on_or_held_back(library: Path) -> None:
    files = quality.library_files(library)
    assert [path.as_posix() for path in files[:3]] == ["a.py", "pack/m00.py", "pack/m01.py"]
    assert len(files) == 32
    assert quality.library_files(library) == files
    seen, held_back = quality.split(files)
    assert not set(seen) & set(held_back)
    assert sorted([*seen, *held_back]) == files
    assert [path.as_posix() for path in held_back] == ["a.py", "pack/m19.py"]


def test_the_tokenizer_gives_back_what_it_has_never_seen() -> None:
    tokenizer = quality.train_tokenizer(["def f(x):\n    return x\n"] * 2)
    ids = quality.encode(tokenizer, ["    é = 'ß'\n", "x"])
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == (
        "    é = 'ß'\n<|endoftext|>x<|endoftext|>"
    )


def figures(perplexity: float, kl: float = 0.0, same: float = 1.0) -> dict[str, float]:
    return {"perplexity": perplexity, "kl_mean": kl, "kl_worst": 10 * kl, "same_top_token": same}


def test_the_table_sets_everything_against_float32() -> None:
    measured = quality.rows(
        {
            ("none", "float32"): figures(20.0),
            ("none", "bfloat16"): figures(20.0, 1e-6),
            ("int4", "auto"): figures(21.0, 0.01, 0.9),
        }
    )
    assert [row.bits for row in measured] == pytest.approx([32, 16, 4.74], abs=0.005)
    assert [row.change for row in measured] == pytest.approx([0, 0, 5])
    assert [row.kl_worst for row in measured] == pytest.approx([0, 1e-5, 0.1])
    assert quality.table(measured).splitlines() == [
        "weights  dtype      bits  perplexity    change        KL  same top",
        "none     float32   32.00     20.0000   +0.000%  0.000000   100.00%",
        "none     bfloat16  16.00     20.0000   +0.000%  0.000001   100.00%",
        "int4     auto       4.74     21.0000   +5.000%  0.010000    90.00%",
    ]


def test_a_trained_model_is_measured_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "training.json").write_text('{"weights": 1}')
    monkeypatch.setattr(quality, "train", None)
    asked: list[Sequence[str]] = []

    def run_tpirt(*arguments: str) -> str:
        asked.append(arguments)
        return json.dumps(figures(20.0) | {"tokens": 7})

    monkeypatch.setattr(quality, "run_tpirt", run_tpirt)
    assert quality.main(["--dir", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    assert all("--kl" in arguments for arguments in asked)
    assert [(each[-3], each[-1]) for each in asked] == list(quality.SETTINGS)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert (saved["eval_tokens"], len(saved["rows"])) == (7, len(asked))


def test_the_rate_rises_and_falls_to_nothing() -> None:
    factors = [quality.rate_factor(progress / 100) for progress in range(101)]
    top = factors.index(max(factors))
    assert factors[top] == 1
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[0] > 0
    assert factors[-1] == pytest.approx(0)
