"""``tpirt synth`` and what it makes, as a user runs them; stored slices on their way to peers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tpirt.cli.main import main
from tpirt.sharding.blocks import Block
from tpirt.testing.models import make_model
from tpirt.testing.processes import PeerProcess, descendants, survivors
from tpirt.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("warm_workers")

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(SHAPE))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def synth(shape: Path, out: Path, world_size: int, *more: str) -> None:
    options = ("--shape", str(shape), "--out", str(out), "--world-size", str(world_size))
    assert main(["synth", *options, "--quantize", "int4", "--quiet", *more]) == 0


def generate(capsys: pytest.CaptureFixture[str], model: Path, *more: str) -> dict[str, Any]:
    options = ("--model", str(model), "--prompt", "Hi", "--max-tokens", "6", "--threads", "1")
    code, out, err = run(capsys, "generate", *options, "--json", "--quiet", *more)
    assert (code, err) == (0, "")
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.mark.parametrize("world_size", [1, 3])
def test_made_and_run_without_further_flags(
    shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], world_size: int
) -> None:
    before = {process.pid for process in descendants()}
    out = tmp_path / "model"
    synth(shape, out, world_size)
    answer = generate(capsys, out, "--quantize", "int4", "--local", str(world_size))
    assert len(answer["token_ids"]) == 6
    assert answer["world_size"] == world_size
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json", "synthetic.json", "slices")
    }
    assert survivors([p for p in descendants() if p.pid not in before]) == []
    store = str(out / "slices")
    assert run(capsys, "store", "verify", "--store", store)[1].count("good") == world_size
    assert run(capsys, "info", "--model", str(out))[0] == 0


def test_slice_that_was_not_made_is_drawn_when_it_is_needed(
    shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--quantize", "int8", "--local", "2", "--ratio", "2.5,1")
    answers = []
    for name, more in (("late", ()), ("early", ("--ratio", "2.5,1", "--quantize", "int8"))):
        out = tmp_path / name
        synth(shape, out, 1, "--seed", "5")
        if more:
            synth(shape, out, 2, "--seed", "5", *more)
        answers.append(generate(capsys, out, *wanted)["token_ids"])
    assert answers[0] == answers[1]
    split = ("split", "--model", str(out), "--world-size", "3", "--out", str(tmp_path / "s"))
    assert run(capsys, *split, "--quiet")[0] == 0
    assert len(list((tmp_path / "s").glob("rank*/*/manifest.json"))) == 3


def test_stored_slice_is_sent_to_a_worker_that_lacks_it(
    shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    synth(shape, out, 2)
    expected = generate(capsys, out, "--quantize", "int4", "--local", "2")["token_ids"]
    with PeerProcess(tmp_path / "remote") as peer:
        for _ in range(2):
            answer = generate(capsys, out, "--quantize", "int4", "--peers", peer.address)
            assert answer["token_ids"] == expected
        assert peer.log.count("received slice") == 1
        (sent,) = peer.store.glob("*/manifest.json")
        made = out / "slices" / sent.parent.name
        for file in made.glob("*.safetensors"):
            assert (sent.parent / file.name).read_bytes() == file.read_bytes()


def test_damaged_stored_slice_is_not_sent(
    shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is made again: a random model's weights follow from its seed."""
    out = tmp_path / "model"
    synth(shape, out, 2)
    options = ("--quantize", "int4", "--quiet")
    expected = generate(capsys, out, *options, "--local", "2")["token_ids"]
    slices = (out / "slices").glob("*/manifest.json")
    (worker,) = (m.parent for m in slices if not json.loads(m.read_text())["shard"]["first"])
    victim = sorted(worker.glob("*.safetensors"))[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with PeerProcess(tmp_path / "remote") as peer:
        answer = generate(capsys, out, *options, "--peers", peer.address)
        assert answer["token_ids"] == expected
        (sent,) = peer.store.glob(f"*/{victim.name}")
        assert sent.read_bytes() == whole


def test_what_split_wrote_is_sent_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = make_model(tmp_path / "tiny"), tmp_path / "split"
    split = ("--model", str(model), "--out", str(out), "--world-size", "2", "--quiet")
    assert main(["split", *split]) == 0

    def no_cutting(_: object, __: object, ___: object, blocks: Sequence[Block]) -> Iterator[Any]:
        assert list(blocks) == [], "was cut again"
        yield from ()

    monkeypatch.setattr(Checkpoint, "cut", no_cutting)
    with PeerProcess(tmp_path / "remote") as peer:
        generate(capsys, model, "--store", str(out), "--peers", peer.address)
        assert peer.log.count("received slice") == 1
    assert sorted(path.name for path in out.iterdir()) == ["known", "rank0", "rank1"]


def test_unknown_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--world-size", "2", "--out", str(tmp_path / "x"))
    code, _, err = run(capsys, "synth", "--shape", "llama-9", *out)
    assert code == 2
    assert "known: llama-2-7b" in err
    assert not (tmp_path / "x").exists()
