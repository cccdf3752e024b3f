"""What bench.scale70b reports: decoded tokens alone, the larger peak, and no floor that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.lib.disk import every_nth, read_rate
from bench.lib.group import LimitedRun, Request
from bench.scale70b import evaluate, remove_model


def figures(bytes_read: int, io_ms: float) -> dict[str, Any]:
    return {
        "peak_rss_bytes": 500,
        "weights_bytes": 1000,
        "bytes_read": bytes_read,
        "io_ms": io_ms,
        "compute_ms": 0.0,
        "comm_ms": 0.0,
    }


def limited_run(token_s: float) -> LimitedRun:
    request = Request(
        ttft_ms=9000.0,
        tokens=4,
        decode_ms=4 * token_s * 1e3,
        decoded=[],
        first=[figures(7000, 900.0)],
        ranks=[figures(7000 + 4 * 600, 900.0 + 4 * 50.0)],
        collective="star",
        comm_dtype="bfloat16",
    )
    return LimitedRun(request, peak_bytes=[400], cache_bytes=[0])


def test_first_token_counts_for_nothing() -> None:
    result = evaluate(
        limited_run(1.5), {2: [600.0, 500.0, 700.0, 90.0, 90.0, 90.0], 8: [100.0] * 6}
    )
    assert result.read_bytes_per_token == 600
    assert result.ranks[0].io_s == pytest.approx(0.05)
    assert result.rate == 600  # the middle of the passes before the run, with two readers
    assert (result.disk_floor_s, result.ratio, result.valid) == (1.0, 1.5, True)


def test_run_that_beats_its_floor_is_invalid() -> None:
    assert not evaluate(limited_run(0.5), {2: [600.0]}).valid


def test_raw_readers_read_every_file(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(7)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(5000 * number + 1))
    assert read_rate(paths, 3) > 0
    total = sum(path.stat().st_size for path in paths)
    assert every_nth(paths, total, 5) == paths
    parts = [every_nth(paths, total // 3, start) for start in range(4)]
    assert sorted(path for part in parts for path in part) == paths
    with pytest.raises(OSError, match="No such file"):
        read_rate([tmp_path / "none"], 2)


def test_removing_leaves_what_is_not_the_benchmarks(tmp_path: Path) -> None:
    mine = tmp_path / "notes.txt"
    mine.touch()
    remove_model(tmp_path)  # no synthetic model: nothing is touched
    (tmp_path / "slices").mkdir()
    for name in ("synthetic.json", "config.json", "slices/x"):
        (tmp_path / name).touch()
    remove_model(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]
