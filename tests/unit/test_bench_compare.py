"""bench.compare: two checkouts run by turns, their figures paired round by round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.compare import compare, figures, main
from tpirt.errors import ConfigError

BENCH = """
import json, pathlib, sys
log = pathlib.Path(sys.argv[1])
with log.open("a") as file:
    print(*sys.argv[2:], file=file)
runs = len(log.read_text().splitlines())
row = {{"tpot_ms": {tpot_ms} + runs, "prompt_ms": 7, "name": "x", "valid": True, "bytes": runs}}
print("a table")
print(json.dumps({{"bench": "x", "settings": {{"old_ms": 1}}, "rows": [row], {more}}}))
"""


def checkout(folder: Path, tpot_ms: float, more: str = "") -> Path:
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "__init__.py").touch()
    (folder / "bench" / "fake.py").write_text(BENCH.format(tpot_ms=tpot_ms, more=more))
    return folder


def test_sides_take_turns_and_are_paired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkout(tmp_path / "old", 100.0, '"gone_ms": 3')
    after = checkout(tmp_path / "new", 200.0)
    log, file = tmp_path / "log", tmp_path / "results" / "compare.json"
    options = ["--before", str(before), "--after", str(after), "--rounds", "3"]
    options += ["--json", str(file), "--before-command", f"fake {log} {{side}} --old-name"]
    assert main([*options, "--", "fake", str(log), "{side}"]) == 0
    order = [line.split()[0] for line in log.read_text().splitlines()]
    assert order == ["before", "after", "after", "before", "before", "after"]
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert json.loads(file.read_text()) == result
    (row,) = result["rows"]  # neither what never differs, nor what one side lacks
    assert row["name"] == "rows.0.tpot_ms"
    assert row["before_rounds"] == [101, 104, 105]
    assert row["after_rounds"] == [202, 203, 206]
    ratios = sorted([202 / 101, 203 / 104, 206 / 105])
    assert [row["lowest_ratio"], row["ratio"], row["highest_ratio"]] == ratios
    assert str(tmp_path) not in printed
    assert result["sides"]["before"]["command"].endswith("bench.fake log '{side}' --old-name")
    assert result["environment"]["tpirt"]


def test_figures_are_chosen_by_name() -> None:
    run = dict(figures({"rows": [{"a_ms": 1, "b": 2, "valid": True, "name": "x"}], "c_s": 3.5}))
    assert run == {"rows.0.a_ms": 1, "rows.0.b": 2, "c_s": 3.5}
    (only,) = compare([run], [{**run, "rows.0.b": 3.0, "c_s": 9.0}], ["b"])
    assert (only.name, only.ratio) == ("rows.0.b", 1.5)
    assert compare([{"a_ms": 0.0}], [{"a_ms": 1.0}], []) == []  # no ratio
    with pytest.raises(ConfigError, match=r"for z; there are: rows\.0\.a_ms"):
        compare([run], [run], ["z"])


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ([], "no command"),
        (["nothing"], "has no bench/nothing.py"),
        (["fails"], "before: exit code 1: ValueError: why"),
        (["silent"], "before: its last line is not a JSON object"),
    ],
)
def test_bad_commands_are_refused(tmp_path: Path, command: list[str], complaint: str) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "fails.py").write_text("raise ValueError('why')")
    (tmp_path / "bench" / "silent.py").write_text("")
    with pytest.raises(ConfigError, match=complaint):
        main(["--before", str(tmp_path), "--after", str(tmp_path), "--", *command])
