"""``tpirt eval --kl``: what a model's predictions differ by from the unquantized model's."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.interrupted import INTERRUPTED
from tpirt.cli.divergence import Divergence, Predictions
from tpirt.cli.main import main
from tpirt.engine import Engine, EngineOptions
from tpirt.errors import RequestError
from tpirt.testing.models import make_model
from tpirt.testing.processes import PeerProcess, killed_at_exit, start_python

CONTEXT = 64
FIGURES = ("kl_mean", "kl_worst", "same_top_token")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("eval") / "tiny", hidden_size=64)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("Pack my box with five dozen liquor jugs. " * 6, encoding="utf-8")
    return path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, of this process and of those that it starts."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return path


@pytest.fixture
def command(model: Path, text: Path, tmp_path: Path) -> list[str]:
    options = ["--model", str(model), "--text", str(text), "--context", str(CONTEXT)]
    return ["eval", "--kl", *options, "--threads", "1", "--store", str(tmp_path / "store")]


def measure(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, float]:
    capsys.readouterr()
    assert main([*command, "--quiet", "--json"]) == 0
    figures: dict[str, float] = json.loads(capsys.readouterr().out)
    return figures


def files(folder: Path) -> list[Path]:
    """All files in a folder and its folders."""
    return [path for path in folder.rglob("*") if not path.is_dir()]


def open_files(folder: Path) -> list[str]:
    """This process's open files in a folder, those without a name as well."""
    if not os.path.isdir("/proc/self/fd"):
        return []
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return [target for target in targets if target.startswith(str(folder))]


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_reference_does_not_differ_from_itself(
    command: list[str], capsys: pytest.CaptureFixture[str], ranks: str
) -> None:
    figures = measure(capsys, *command, "--dtype", "float32", "--local", ranks)
    assert [figures[name] for name in FIGURES] == [0, 0, 1]


async def all_logits(model: Path, text: str, options: EngineOptions) -> torch.Tensor:
    """Logits that predict the pieces of a text, (T, V) float64."""
    async with Engine.connect(model, options) as engine:
        ids = engine.encode(text)
        pieces = [ids[start : start + CONTEXT] for start in range(0, len(ids), CONTEXT)]
        return torch.cat([(await engine.logits(piece))[:-1] for piece in pieces]).double()


def test_figures_are_those_of_the_formula(
    command: list[str], model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = EngineOptions(dtype="float32", threads=1, store=tmp_path / "store")
    p, q = (
        asyncio.run(all_logits(model, text.read_text(), options)).softmax(1)
        for options in (plain, replace(plain, quantize="int4"))
    )
    expected = (p * (p / q).log()).sum(1)
    assert expected.mean() > 1e-4
    figures = measure(capsys, *command, "--quantize", "int4", "--dtype", "float32")
    assert figures["kl_mean"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert figures["kl_worst"] == pytest.approx(float(expected.max()), rel=1e-5)
    same = (p.argmax(1) == q.argmax(1)).double()
    assert figures["same_top_token"] == pytest.approx(float(same.mean()))
    assert figures["tokens"] == len(expected)


def test_a_known_pair() -> None:
    with Predictions(2, 2) as reference:
        reference.append(torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log())
        divergence = Divergence(reference)
        divergence.add(torch.tensor([[0.5, 0.5]]).log())
        divergence.add(torch.tensor([[0.25, 0.75]]).log())
    assert divergence.worst == pytest.approx(0.5 * math.log(3), rel=1e-6)
    assert divergence.mean == pytest.approx(0.25 * math.log(3), rel=1e-6)
    assert (divergence.tokens, divergence.same_top) == (2, 0.5)


def test_one_line_with_all_figures(
    command: list[str], temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--quantize", "int8"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "nats per token (mean), worst token " in out
    assert ", same top token " in out
    first = err.splitlines()[0]
    assert first.startswith("tpirt: log-probabilities of the unquantized model take ")
    assert str(temporary) in first
    assert files(temporary) == open_files(temporary) == []


def test_peers_serve_both_models(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with PeerProcess(tmp_path / "peer") as peer:
        figures = measure(capsys, *command, "--quantize", "int8", "--peers", peer.address)
    assert 0 < figures["kl_mean"] < figures["kl_worst"] < 1


def test_nothing_stays_after_a_failure(
    command: list[str],
    temporary: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def fail(self: Divergence, log_probs: torch.Tensor) -> None:
        seen.extend(open_files(temporary))
        raise RequestError("failed")

    monkeypatch.setattr(Divergence, "add", fail)
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("tpirt: error: failed\n")
    assert len(seen) == 1 or not os.path.isdir("/proc/self/fd")
    assert files(temporary) == open_files(temporary) == []


def test_nothing_stays_after_an_interrupt(command: list[str], temporary: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    interrupted = ("-c", INTERRUPTED, "evaluating", *command, "--quiet")
    with killed_at_exit(start_python(*interrupted, text=True, env=dict(os.environ), **pipes)) as it:
        assert it.communicate(timeout=30) == ("", "tpirt: interrupted\n")
    assert it.returncode == 130
    assert files(temporary) == []


def test_a_disk_without_room_is_told_of_before_anything_is_loaded(
    command: list[str],
    temporary: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = shutil.disk_usage(temporary)._replace(free=1000)
    monkeypatch.setattr("tpirt.files.shutil.disk_usage", lambda _: full)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in (str(temporary), "the disk has 0.977 KiB free", "TMPDIR", "--max-pieces"):
        assert words in error
    assert not (tmp_path / "store").exists()
    assert files(temporary) == []


def test_a_write_that_fails_names_the_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Predictions(1, 4) as kept:
        kept._file.close()
        kept._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
        with pytest.raises(RequestError, match=f"{temporary}.*No space left"):
            kept.append(torch.zeros(1, 4))


def test_a_wrong_option_is_refused_before_the_reference_is_computed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--quantize", "int5"]) == 2
    assert "int5" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_context_of_one_token_is_refused_by_name(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--context", "1"]) == 2
    assert "--context 1: expected at least 2" in capsys.readouterr().err
