"""bench.quality: which text a model is judged by, and the table's arithmetic."""

from __future__ import annotations

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


def test_the_table_sets_everything_against_float32() -> None:
    measured = quality.rows(
        {("none", "float32"): 20.0, ("none", "bfloat16"): 20.0, ("int4", "auto"): 21.0}
    )
    assert [row.bits for row in measured] == [32, 16, 4.5]
    assert [row.change for row in measured] == pytest.approx([0, 0, 5])
    assert quality.table(measured).splitlines() == [
        "weights      bits  perplexity   change",
        "float32     32.00     20.0000   +0.00%",
        "bfloat16    16.00     20.0000   +0.00%",
        "int4         4.50     21.0000   +5.00%",
    ]


def test_the_rate_rises_and_falls_to_nothing() -> None:
    factors = [quality.rate_factor(progress / 100) for progress in range(101)]
    top = factors.index(max(factors))
    assert factors[top] == 1
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[0] > 0
    assert factors[-1] == pytest.approx(0)
