"""The benchmark of kernels, in a few milliseconds each: what it measures and how it computes."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bench.kernels import Budget, fits, main, timed
from bench.lib.kernel_calls import Weights
from tpirt.errors import ConfigError
from tpirt.ops.native.library import load


def test_weights_are_aligned_and_finite() -> None:
    weights = Weights(1 << 16)
    pieces = weights.pieces(1000)
    assert [piece.data_ptr() % 64 for piece in pieces] == [0] * (1 << 6)
    assert all(len(piece) == 1000 for piece in pieces)
    assert weights.memory.view(torch.bfloat16).isfinite().all()
    assert weights.memory.view(torch.float16).isfinite().all()
    with pytest.raises(ConfigError, match="does not fit"):
        weights.pieces((1 << 16) + 1)


@pytest.mark.skipif(load().path is None, reason="no native kernels here")
def test_every_kernel_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = ["--threads", "1", "--shapes", "64x96", "--rows", "1,16", "--memory", "1M"]
    assert main([*options, "--minutes", "0", "--sets", "scalar"]) == 0
    assert torch.get_num_threads() == threads
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    products = result["products"]
    measured = [(row["format"], row["kernel"], row["rows"]) for row in products]
    assert measured == [
        *(("int4", "scalar", rows) for rows in (1, 16)),
        ("int4", "dense-bfloat16", 16),
        ("int4", "dense-float32", 16),
        *(("nl4", "scalar", rows) for rows in (1, 16)),
        ("nl4", "dense-bfloat16", 16),
        ("nl4", "dense-float32", 16),
        *(("int8", "scalar", rows) for rows in (1, 16)),
        ("int8", "dense-bfloat16", 16),
        ("int8", "dense-float32", 16),
        *(("bf16", "scalar", rows) for rows in (1, 16)),
        *(("bf16", "torch", rows) for rows in (1, 16)),
        *(("f16", "scalar", rows) for rows in (1, 16)),
        *(("f16", "torch", rows) for rows in (1, 16)),
    ]
    weights = {row["format"]: row["weights_bytes"] for row in products}
    count = 64 * 96
    assert weights == {
        "int4": count // 2 + count // 16,
        "nl4": count // 2 + count // 16,
        "int8": count + 4 * 64,
        "bf16": 2 * count,
        "f16": 2 * count,
    }
    for row in products:
        assert math.isclose(row["bytes_per_s"], row["weights_bytes"] / row["ms"] * 1e3)
        assert math.isclose(row["ratio"], row["bytes_per_s"] / row["read_bytes_per_s"])
    assert {row["function"] for row in result["glue"]} == {"round", "norm", "gate", "attend"}
    assert len(table) == 3 + len(products) + len(result["glue"])


def test_a_run_takes_its_minutes_and_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long calls get shorter shares to those after them, and the longest are left out."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr("bench.kernels.time", clock)
    budget, measured = Budget(60, 100), []
    for number in range(100):
        share = budget.share()
        call_s = 100.0 if number % 10 == 9 else 0.3 if number % 10 == 8 else 0.01
        if fits(call_s, share):
            measured.append(number)
            assert timed(lambda s=call_s: sleep(s), share).median == pytest.approx(call_s)
    assert measured == [number for number in range(100) if number % 10 != 9]
    assert 55 < now < 62


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--formats", "int3"])
    assert "expected int4, nl4, int8, bf16, f16" in capsys.readouterr().err
    if load().path is not None:
        with pytest.raises(ConfigError, match="--sets: expected"):
            main(["--sets", "mmx", "--memory", "1M", "--threads", "1"])
