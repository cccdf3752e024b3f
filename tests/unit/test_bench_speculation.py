"""Guesses: differences of counters, gains of a round, predictions, one command for both halves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.group import Answer
from bench.lib.trained_draft import trained_draft
from bench.speculation import Sample, combine, difference, main, summarize
from tpirt.engine.model import BUNDLED_MODEL
from tpirt.testing.models import make_model

BEFORE = {"steps": 2, "guesses": 6, "right": 3, "seconds": 1.0, "hit": {"a": 1}}
AFTER = {"steps": 5, "guesses": 9, "right": 4, "seconds": 3.0, "hit": {"a": 3, "b": 1}}


def test_counters_are_those_since_before() -> None:
    expected = {"steps": 3, "guesses": 3, "right": 1, "seconds": 2.0, "hit": {"a": 2, "b": 1}}
    assert difference(AFTER, BEFORE) == expected
    assert difference(AFTER, {}) == AFTER


def answer(tokens: int, decode_ms: float, same: bool = True, **drafts: Any) -> Answer:
    return Answer(50.0, tokens, decode_ms, tokens, same, BEFORE, drafts)


def test_answers_of_a_round_are_one_sample() -> None:
    found = combine([answer(3, 30.0), answer(5, 90.0, same=False, **AFTER)])
    assert (found.tokens, found.decode_ms, found.steps, found.same) == (8, 120.0, 8, False)
    assert found.tpot_ms == 15.0
    assert found.drafts["guesses"] == 3


def sample(tpot_ms: float, **drafts: Any) -> Sample:
    return Sample(10, 10 * tpot_ms, 5, True, drafts)


def test_gains_are_those_of_a_round() -> None:
    counters = {"steps": 1, "guesses": 4, "right": 3, "tested": {"a": 4}, "hit": {"a": 3}}
    times = {"seconds": 0.1, "predicted_s": 0.1, "predicted_saved_s": 0.1}
    samples = {
        ("text", "none"): [sample(20), sample(40)],
        ("text", "auto"): [sample(10, **counters, **times), sample(10, **counters, **times)],
    }
    row = summarize(samples, "text", "auto")
    assert (row.gain, row.lowest_gain, row.highest_gain) == (3.0, 2.0, 4.0)
    assert (row.predicted, row.tokens_a_step, row.right) == (2.0, 2.0, 3)
    assert row.hit_rates == {"a": 0.75}
    none = summarize(samples, "text", "none")
    assert (none.gain, none.predicted, none.hit_rates) == (1.0, None, {})


def test_steps_without_guesses_are_in_the_predicted_gain() -> None:
    """Half of the time had guesses; they were expected to take 0.1 s, and 0.3 s one by one."""
    drafts = {"steps": 1, "seconds": 0.2, "predicted_s": 0.1, "predicted_saved_s": 0.2}
    assert sample(40, **drafts).predicted == pytest.approx((0.2 + 0.3) / (0.2 + 0.1))
    assert sample(40).predicted is None


def test_one_command_emulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    options = ["--model", str(model), "--store", str(tmp_path / "store"), "--dtype", "float32"]
    options += ["--hit-rates", "0,1", "--rounds", "1", "--tokens", "40", "--prompt-tokens", "4"]
    assert main(options) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["emulated"]
    none, wrong, right = result["rows"]
    assert [row["drafts"] for row in result["rows"]] == ["none", "emulated 0", "emulated 1"]
    assert (none["gain"], none["hit_rates"]) == (1.0, {})
    assert (wrong["hit_rates"], right["hit_rates"]) == ({"known": 0.0}, {"known": 1.0})
    assert all(row["same"] for row in result["rows"])
    assert "emulated 1" in table[3]
    assert str(tmp_path) not in last


def test_a_draft_of_the_bundled_models_tokenizer_is_trained_once(tmp_path: Path) -> None:
    folder = trained_draft(tmp_path / "draft", minutes=0.001)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert trained_draft(folder, minutes=1000) == folder
    assert weights.stat().st_mtime_ns == written
    own, bundled = (
        json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        for model in (folder, BUNDLED_MODEL)
    )
    assert own == bundled


def test_a_draft_is_trained_for_the_bundled_model_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--train-draft", str(tmp_path), "--model", str(tmp_path)])
    assert "no --model, no --draft" in capsys.readouterr().err


@pytest.mark.nightly
def test_texts_are_answered_by_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "1", "--tokens", "30", "--dtype", "float32"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {(row["text"], row["drafts"]): row for row in result["rows"]}
    assert len(found) == 6
    assert found["editing", "auto"]["hit_rates"]
