"""Results of benchmarks: traceable to code and machine, and free of local paths."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench.lib.environment import git_state
from bench.lib.record import Record, add_json_option
from tpirt.version import __version__


def test_result_says_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    add_json_option(parser)
    argv = ["--model", str(tmp_path / "llama"), f"--json={tmp_path}/kept/result.json"]
    threads = torch.get_num_threads()
    Record("some", argv, parser.parse_args(argv)).finish({"rows": [1]})
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert json.loads((tmp_path / "kept" / "result.json").read_text()) == result
    assert (result["bench"], result["rows"]) == ("some", [1])
    assert result["settings"] == {"model": "llama"}
    environment = result["environment"]
    assert environment["command"] == "python -m bench.some --model llama --json=result.json"
    assert environment["tpirt"] == __version__
    assert environment["date"].endswith("+00:00")
    assert environment["cpu"]
    assert all(rate > 1e8 for rate in environment["memory_bytes_per_s"].values())
    assert "1" in environment["memory_bytes_per_s"]
    assert str(tmp_path) not in printed


def test_a_checkout_with_changes_is_dirty(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, None)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "tracked").touch()
    git("add", "tracked")
    git("commit", "-m", "first")
    (tmp_path / "untracked").touch()
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "tracked").write_text("changed")
    assert git_state(tmp_path) == (commit, True)
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") == (None, None)
