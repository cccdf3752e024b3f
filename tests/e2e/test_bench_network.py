"""The network benchmarks, run to their end on links so slow that no machine is in the way."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.allreduce import Row, show
from bench.latency import chosen_points
from bench.net.namespace import Namespace
from bench.net.spec import LinkError
from tests.support.nightly import nightly
from tpirt.batch import Algorithm
from tpirt.testing.models import make_model
from tpirt.testing.processes import descendants, run_python

ROOT = Path(__file__).parents[2]
LINK = "20ms/20mbit"


@pytest.fixture(scope="module", autouse=True)
def _rights() -> None:
    try:
        Namespace().close()
    except LinkError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(path, num_hidden_layers=2)
    return path


def bench(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = run_python(
        *("-m", f"bench.{module}", *arguments),
        text=True,
        cwd=ROOT,
        timeout_s=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not descendants()
    return values


@pytest.mark.parametrize(
    ("backend", "contenders"),
    [
        nightly("relay", ["star"]),
        nightly(
            "auto", [*(each.value + how for each in Algorithm for how in ("", " sealed")), "gloo"]
        ),
    ],
)
def test_allreduce(tmp_path: Path, backend: str, contenders: list[str]) -> None:
    out = tmp_path / "results" / "allreduce.json"
    done = bench(
        "allreduce",
        *("--latency", "20", "--rate", "20", "--sizes", "4K", "--devices", "2"),
        *("--rounds", "2", "--seconds", "0.5", "--json", str(out), "--backend", backend),
        *("--collective", ",".join(each.value for each in Algorithm if each.value in contenders)),
    )
    rows = result(done)["rows"]
    assert [row["contender"] for row in rows] == contenders
    for row in rows:
        assert row["median_ms"] >= row["floor_ms"] > 20
    assert json.loads(out.read_text())["rows"] == rows
    assert str(tmp_path) not in out.read_text()


def test_sealed_sums_on_loopback_are_a_comparison(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = Row(2, 0.0, None, 16 << 10, "star sealed", 20, 0.4, 0.5, 0.0, None, 0.3, 150.0, 0.2, None)
    show([replace(row, contender="star"), replace(row, latency_ms=1.0)])
    assert "for comparison" not in capsys.readouterr().out
    show([row])
    assert capsys.readouterr().out.endswith("tpirt does not encrypt loopback\n")


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["auto", "relay"])
def test_latency(model: Path, tmp_path: Path, backend: str) -> None:
    plot = tmp_path / "plot.png"
    done = bench(
        "latency",
        *("--link", LINK, "--backend", backend, "--model", str(model), "--collective", "one-shot"),
        *("--prompt-tokens", "8", "--tokens", "4", "--trials", "1", "--plot", str(plot)),
    )
    values = result(done)
    (row,) = values["rows"]
    assert (row["collective"], row["hops"], row["latency_ms"]) == ("one-shot", 4, 20)
    parts = (row[f"{cause}_ms"] for cause in ("compute", "disk", "network", "other"))
    assert row["tpot_ms"] == pytest.approx(sum(parts), rel=0.2)
    assert row["tpot_ms"] >= row["links_ms"] > 4 * 20
    assert row["floor_ms"] == pytest.approx(row["links_ms"] + row["resident_ms"])
    assert 4 * 64 * 2 < row["wire_bytes"] < 100_000
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in done.stdout
    assert values["settings"]["model"] == model.name


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        nightly(("--model", "no-such-model"), "no-such-model"),
        nightly(("--model", "MODEL", "--collective", "telepathy"), "telepathy"),
        (("--model", "MODEL", "--latency", "-3"), "is no latency"),
        (("--model", "MODEL", "--profile", "home-wifi", "--latency", "1"), "not one value for all"),
        nightly(
            (
                *("--model", "MODEL", "--backend", "relay"),
                *("--devices", "3", "--collective", "one-shot"),
            ),
            "take --collective star",
        ),
    ],
)
def test_bad_input_is_one_line(model: Path, arguments: tuple[str, ...], complaint: str) -> None:
    filled = [str(model) if word == "MODEL" else word for word in arguments]
    done = bench("latency", *filled, "--tokens", "2", "--trials", "1")
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not descendants()


def test_links_are_varied_one_by_one() -> None:
    from bench.latency import _parser

    arguments = _parser().parse_args(
        ["--shape", "x", "--link", "1ms/300mbit", "--latency", "1,5", "--rate", "100,300"]
    )
    names = [name for name, _ in chosen_points(arguments, 2)]
    assert names == ["1ms/100mbit", "1ms/300mbit", "5ms/100mbit", "5ms/300mbit"]
