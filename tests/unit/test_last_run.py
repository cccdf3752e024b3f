"""The file in which a chat keeps its options for the next one."""

from __future__ import annotations

import argparse
import os
import stat
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpirt.cli import last_run
from tpirt.cli.chat import add_command
from tpirt.engine.model import BUNDLED_MODEL
from tpirt.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TPIRT_IDENTITY", str(tmp_path / "tpirt"))
    return tmp_path / "tpirt"


def parsed(*options: str) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    commands = argparse.ArgumentParser().add_subparsers()
    add_command(commands)
    parser = commands.choices["chat"]
    return parser, parser.parse_args(options)


def taken_up(*options: str) -> tuple[str, argparse.Namespace]:
    parser, arguments = parsed(*options)
    return last_run.take_up(parser, arguments), arguments


def run(*options: str) -> None:
    parser, arguments = parsed(*options)
    last_run.take_up(parser, arguments)
    last_run.remember(parser, arguments)


def test_the_next_run_is_as_the_last(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "my model"
    model.mkdir()
    run(
        *("--model", str(model), "--peers", "kitchen,[fe80::1%eth0]:5", "--ratio", "2,1,1.5"),
        *("--memory", "900M", "--spill", "none", "--context", "4096", "--quantize", "int4"),
        *("--timeout", "7.5", "--insecure", "--system", "be brief", "--temperature", "0"),
    )
    written = (folder / "tpirt.toml").read_text()
    assert 'memory = "900M"' in written
    assert stat.S_IMODE((folder / "tpirt.toml").stat().st_mode) == 0o600
    said, arguments = taken_up()
    assert said == (
        f"--model '{model}' --peers 'kitchen:50051,[fe80::1%eth0]:5' --ratio 2,1,1.5 "
        "--memory 900M --spill none --quantize int4 --timeout 7.5 --context 4096"
    )
    assert arguments.model == str(model)
    assert arguments.peers == ("kitchen:50051", "[fe80::1%eth0]:5")
    assert arguments.ratio == (2.0, 1.0, 1.5)
    assert (arguments.memory, arguments.spill, arguments.context) == (900 << 20, 0, 4096)
    assert (arguments.quantize, arguments.timeout) == ("int4", 7.5)
    assert (arguments.local, arguments.dtype) == (1, "auto")
    assert not arguments.insecure  # to be said each time
    assert arguments.system is None
    assert arguments.temperature is None


def test_what_is_given_comes_first(folder: Path) -> None:
    run("--local", "3", "--quantize", "int8", "--context", "100")
    said, arguments = taken_up("--quantize", "none", "--context", "50")
    assert said == "--local 3"
    assert (arguments.local, arguments.quantize, arguments.context) == (3, "none", 50)
    for options in (("--fresh",), ("--model", "x")):
        said, arguments = taken_up(*options)
        assert said == ""
        assert arguments.quantize == "none"


@pytest.mark.parametrize("options", [("--local", "1"), ("--peers", "b"), ("--discover",)])
def test_other_devices_take_the_place_of_those_before(
    folder: Path, options: tuple[str, ...]
) -> None:
    """The model and how it runs stay."""
    run(
        *("--model", "m", "--peers", "a,b", "--spares", "c", "--ratio", "2,1,1"),
        *("--quantize", "int4"),
    )
    said, arguments = taken_up(*options)
    assert said == "--model m --quantize int4"
    assert (arguments.spares, arguments.ratio) == ((), None)


def test_a_first_run_and_one_of_defaults(folder: Path) -> None:
    said, arguments = taken_up()
    assert said == ""
    assert (arguments.model, arguments.local, arguments.spill) == (None, 1, 4 << 30)
    run()
    assert taken_up()[0] == ""
    run("--discover", "--no-journal")
    assert taken_up()[0] == "--discover --no-journal"
    run("--fresh", "--local", "2")  # neither uses nor changes it
    assert taken_up()[0] == "--discover --no-journal"


def test_the_bundled_model_is_not_a_path(folder: Path) -> None:
    """It is that of the tpirt that runs, wherever this is installed by then."""
    run("--local", "2", "--model", os.path.relpath(BUNDLED_MODEL))
    assert "model" not in tomllib.loads((folder / "tpirt.toml").read_text())["chat"]
    (folder / "tpirt.toml").write_text(f"[chat]\nlocal = 2\nmodel = '{BUNDLED_MODEL}'\n")
    assert taken_up()[0] == "--local 2"


def test_an_equal_run_leaves_an_edited_file_alone(folder: Path) -> None:
    folder.mkdir()
    edited = "# mine\n[chat]\nlocal = 2 # two\nspill = '4G'\nmemory = '2g'\n"
    (folder / "tpirt.toml").write_text(edited)
    run()
    assert (folder / "tpirt.toml").read_text() == edited
    run("--memory", "3G")
    assert 'memory = "3G"' in (folder / "tpirt.toml").read_text()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[chat]\nlocal = \n", "(at line 2, column 9)"),
        ("[chat]\n\nmemory = 'lots'\n", "line 3: memory: size 'lots': expected a number with K"),
        ("[chat]\nmodle = 'x'\n", "line 2: modle: unknown; did you mean model?"),
        ("[chat]\nxyzzy = 'x'\n", "line 2: xyzzy: unknown; known are model, local, "),
        ("[chat]\ndtype = 'int3'\n", "line 2: dtype: 'int3': expected one of auto, float32"),
        ("[chat]\nlocal = true\n", "line 2: local: expected text or a number, got True"),
        ("[chat]\ndiscover = 1\n", "line 2: discover: expected true or false, got 1"),
        ("[chat]\nlocal = 2\npeers = ['a']\n", "line 3: peers: not together with local"),
        ("[chat]\npeers = []\n", "line 2: peers: expected text"),
        ("[chat]\npeers = ['a', 'a']\n", "listed twice"),
        ("\n[chats]\n", "line 2: chats: expected only [chat]"),
        ("chat = 3\n", "line 1: chat: expected only [chat]"),
        ("\xff", "not UTF-8 text (byte 0)"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(folder: Path, text: str, why: str) -> None:
    folder.mkdir()
    (folder / "tpirt.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as raised:
        taken_up()
    assert str(folder / "tpirt.toml") in str(raised.value)
    assert why in str(raised.value)
    assert "--fresh" in str(raised.value)
    assert taken_up("--fresh")[0] == ""
    run("--model", "x", "--local", "2")  # a run that names its own replaces it
    assert taken_up()[0] == "--model x --local 2"


def test_a_byte_order_mark_is_skipped(folder: Path) -> None:
    folder.mkdir()
    (folder / "tpirt.toml").write_text("\ufeff[chat]\nlocal = 2\n")
    assert taken_up()[0] == "--local 2"


def test_without_a_folder_nothing_is_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TPIRT_IDENTITY", str(tmp_path / "file" / "tpirt"))
    run("--local", "2")
    assert taken_up()[0] == ""
    monkeypatch.delenv("TPIRT_IDENTITY")
    monkeypatch.setenv("HOME", "nowhere")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    run("--local", "2")
    assert taken_up()[0] == ""


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.one_of(
    TEXTS,
    st.lists(TEXTS, max_size=3),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
)


@given(st.dictionaries(st.sampled_from(("model", "store-limit", "peers")), VALUES))
def test_what_is_written_reads_the_same(values: dict[str, last_run.Value]) -> None:
    assert tomllib.loads(last_run.dumps(values)) == values
