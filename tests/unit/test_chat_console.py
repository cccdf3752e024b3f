"""What reaches the streams: control characters, encodings, lines, the plan, plain input."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import re
import stat
import sys
import termios
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input

from tpirt.chat.console import Console, is_capable, is_terminal, printable
from tpirt.chat.modes import TerminalModes
from tpirt.chat.plan_view import show_advice, show_plan
from tpirt.chat.prompt import CommandCompleter, PromptReader, clean, history_file, open_history
from tpirt.chat.reader import PlainReader
from tpirt.chat.status import peers_table
from tpirt.config import ModelConfig
from tpirt.planning import Deployment, PeerProfile, PlanOptions, plan
from tpirt.testing.models import make_model
from tpirt.weights.shapes import find_shape


class Terminal(io.StringIO):
    """Claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_printable_keeps_text_only() -> None:
    every = "".join(map(chr, range(0x100)))
    kept = "\t\n" + "".join(map(chr, [*range(0x20, 0x7F), *range(0xA0, 0x100)]))
    assert printable(every) == kept
    assert (
        printable("a\x1b[31mb\x1b]0;t\x07\x9b2J\r\u00e9\U0001f44b")
        == "a[31mb]0;t2J\u00e9\U0001f44b"
    )


def test_an_answer_is_interrupted_by_a_remark_on_a_terminal_only() -> None:
    for stream, shown in ((Terminal(), "Once\n"), (io.StringIO(), "Once")):
        console = Console(stream, stream)
        console.stream("Once")
        for _ in range(2):
            console.end_line_on_terminal()
        assert stream.getvalue() == shown


def test_a_file_gets_answers_unchanged_and_nothing_else() -> None:
    terminal, file, log = Terminal(), io.StringIO(), io.StringIO()
    for out, err in ((terminal, Terminal()), (file, log)):
        console = Console(out, err)
        console.stream("a\x1b[2Jb\x00\n")
        console.say("c\x1b[2J")
        console.note("d\x1b[2J")
        console.complain("e\x1b[2J")
    assert terminal.getvalue() == "a[2Jb\nc[2J\n"
    assert file.getvalue() == "a\x1b[2Jb\x00\nc[2J\n"
    assert log.getvalue() == "d[2J\nerror: e[2J\n"


def test_remarks_begin_on_a_line_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    both = Terminal()
    console = Console(both, both)
    console.stream("half a line")
    console.complain("oh\nno")
    console.stream("whole\n")
    console.note("fine")
    assert both.getvalue() == "half a line\nerror: oh no\nwhole\nfine\n"


@pytest.mark.parametrize(
    ("term", "no_color"), [("xterm", None), ("xterm", ""), ("xterm", "1"), ("dumb", None)]
)
def test_dim_only_where_it_shows(
    monkeypatch: pytest.MonkeyPatch, term: str, no_color: str | None
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    err = Terminal()
    Console(io.StringIO(), err).note("quiet")
    assert ("\x1b" in err.getvalue()) == (term == "xterm" and not no_color)


@pytest.mark.parametrize("no_color", [None, "1"])
def test_a_prompt_that_is_left_is_grey_only_where_colour_is_wanted(
    monkeypatch: pytest.MonkeyPatch, no_color: str | None
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    ours, theirs = pty.openpty()
    with (
        create_pipe_input() as keys,
        open(theirs, "w", encoding="utf-8") as out,
        create_app_session(input=keys),
    ):
        keys.send_text("\x04")
        assert asyncio.run(PromptReader(out, None).read()) is None
    drawn = b""
    with contextlib.suppress(OSError):  # after all that was written to the other end
        while part := os.read(ours, 1 << 16):
            drawn += part
    os.close(ours)
    assert (re.search(rb"\x1b\[[0-9;]*38;", drawn) is None) == (no_color == "1")


def test_what_the_encoding_lacks_becomes_a_question_mark() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Console(out, io.StringIO()).stream("n\u00e9 \U0001f44b")
    assert raw.getvalue() == b"n? ?"


def test_kinds_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERM", raising=False)
    closed = Terminal()
    closed.close()
    assert not any(map(is_terminal, (None, io.StringIO(), closed)))
    assert is_terminal(Terminal())
    assert not is_capable(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert is_capable(Terminal())


def test_a_crash_in_an_answer_leaves_the_echo_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()

    def echo() -> bool:
        return bool(termios.tcgetattr(ours)[3] & termios.ECHO)

    with open(ours, "rb"), open(theirs, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        modes = TerminalModes()
        with contextlib.suppress(ZeroDivisionError), modes.echo_off():
            assert not echo()
            raise ZeroDivisionError
        assert echo()


def test_a_terminal_that_is_gone_has_no_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with TerminalModes().echo_off():
            os.close(ours)
        with TerminalModes().echo_off():
            pass


# -- plan ------------------------------------------------------------------------------------


def load_plan(
    path: Path, ranks: int, window: int | None = None, memory_bytes: int | None = None
) -> Deployment:
    config = ModelConfig.from_dir(make_model(path, num_attention_heads=16, num_key_value_heads=4))
    peers = [
        PeerProfile(r, f"pi\x1b{r}", f"host{r}", None, None, 1, 1, False) for r in range(ranks)
    ]
    options = PlanOptions(
        window=window, memory_bytes=memory_bytes, dtype="float32", chunk_tokens=16
    )
    return plan(config, peers, options)


def plan_lines(deployment: Deployment) -> list[str]:
    out = io.StringIO()
    show_plan(deployment, out)
    assert "\x1b" not in out.getvalue()
    return out.getvalue().splitlines()


def test_plan_of_one(tmp_path: Path) -> None:
    head, rank, dtype = plan_lines(load_plan(tmp_path, 1))
    assert head.split()[:2] == ["rank", "peer"]
    assert rank.split()[:5] == ["0", "pi0", "16", "4", "160"]
    assert rank.endswith("none  resident")
    assert dtype == "dtype float32 (as asked)"


@pytest.mark.parametrize(
    ("quantize", "end"),
    [
        ("int4", "(as asked), weights in int4"),
        ("auto", "weights in float32 (all weights fit in memory)"),
    ],
)
def test_quantization_is_shown_with_its_reason(tmp_path: Path, quantize: str, end: str) -> None:
    config = ModelConfig.from_dir(make_model(tmp_path))
    peer = PeerProfile(0, "pi", "host", None, None, 1, 1, False)
    options = PlanOptions(quantize=quantize, dtype="float32")
    assert plan_lines(plan(config, [peer], options))[-1].endswith(end)


def test_plan_of_resident_peers_by_address_fits_eighty_columns(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(find_shape("llama-3.1-8b"))
    peers = [
        PeerProfile(r, f"192.168.1.10{r}:50051", f"host{r}", int(9.03 * 2**30), None, 1, 1, True)
        for r in range(2)
    ]
    lines = plan_lines(plan(config, peers, PlanOptions(quantize="int4")))
    assert lines[1].endswith("resident")
    assert max(map(len, lines[:3])) <= 80


def test_plan_of_many_is_cut(tmp_path: Path) -> None:
    lines = plan_lines(load_plan(tmp_path, 11))
    assert len(lines) == 1 + 8 + 1 + 1
    assert lines[-2] == "... and 3 more"


def test_advice_tells_the_disk_space_of_this_machines_slices(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(find_shape("llama-3.1-8b"))
    peers = [PeerProfile(r, f"pi{r}", f"host{r}", 4 << 30, None, 1, 1, True) for r in range(2)]
    short, enough = (plan(config, peers, PlanOptions(quantize=q)) for q in ("none", "int4"))
    store = tmp_path / "not" / "there" / "yet"
    out = io.StringIO()
    show_advice(enough, store, out)
    assert out.getvalue() == ""
    show_advice(short, None, out)
    assert len(out.getvalue().splitlines()) == 2
    out = io.StringIO()
    show_advice(short, store, out)
    _, disk, _ = out.getvalue().splitlines()
    assert re.fullmatch(r"slices take 7\.\d+ GiB of disk in .*/yet, where .* are free", disk)


@pytest.mark.parametrize(
    ("window", "memory_bytes", "held"),
    [
        (2, None, "streamed, window 2 of 8 blocks"),
        (8, None, "resident"),
        (None, 1 << 30, "resident"),
    ],
)
def test_how_weights_are_held(
    tmp_path: Path, window: int | None, memory_bytes: int | None, held: str
) -> None:
    assert plan_lines(load_plan(tmp_path, 2, window, memory_bytes))[1].endswith(held)


@pytest.mark.parametrize(
    ("spare", "held"), [(0, "resident"), (-1, "streamed, window 4 of 7 blocks, 1 resident")]
)
def test_the_limit_decides(tmp_path: Path, spare: int, held: str) -> None:
    budget = load_plan(tmp_path, 1).ranks[0].budget
    need = budget.process_bytes + budget.step_bytes(1) + budget.weights_bytes
    assert held in plan_lines(load_plan(tmp_path, 1, None, need + spare))[1]


# -- input -----------------------------------------------------------------------------------


async def read_all(reader: PlainReader) -> list[str]:
    lines = []
    while (line := await reader.read()) is not None:
        lines.append(line)
    return lines


async def test_plain_lines_in_pieces() -> None:
    ours, theirs = os.pipe()
    reader = PlainReader(ours)
    os.write(theirs, b"one\r\ntw")
    assert await reader.read() == "one"
    os.write(theirs, b"o\n\n\xc3\xa9\xff\xfe\nlast")
    os.close(theirs)
    assert await read_all(reader) == ["two", "", "\u00e9\ufffd\ufffd", "last"]
    assert await reader.read() is None
    os.close(ours)


async def test_all_input_is_one_text_unless_its_writer_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tpirt.chat.reader._SILENCE_S", 0.05)
    ours, theirs = os.pipe()
    reader = PlainReader(ours)
    os.write(theirs, b"Dear")  # within a line: the writer has not finished
    letter = asyncio.ensure_future(reader.read_all())
    await asyncio.wait({letter}, timeout=0.2)
    assert not letter.done()
    os.write(theirs, b" all,\n")
    assert await letter is None
    assert await reader.read() == "Dear all,"
    os.write(theirs, b"Bye\nand\n")
    os.close(theirs)
    assert await reader.read_all() == "Bye\nand"
    os.close(ours)


async def test_plain_lines_of_a_file_and_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("a\nb\n")
    handle = os.open(tmp_path / "in", os.O_RDONLY)
    assert await read_all(PlainReader(handle)) == ["a", "b"]
    os.close(handle)
    assert await read_all(PlainReader(None)) == []


async def test_a_prompt_where_one_is_wanted() -> None:
    ours, theirs = os.pipe()
    shown = io.StringIO()
    reader = PlainReader(ours, shown)
    reader.interrupt()
    os.write(theirs, b"a\n")
    os.close(theirs)
    assert await read_all(reader) == ["a"]
    assert shown.getvalue() == "\n(/exit or Ctrl-D leaves)\n> > > \n"
    os.close(ours)


def completions(text: str) -> list[str]:
    found = CommandCompleter().get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


def test_completion(tmp_path: Path) -> None:
    assert completions("/s") == ["/system ", "/set ", "/stats", "/save "]
    assert completions("/set te") == ["temperature"]
    assert completions("hello /s") == completions("/stats t") == completions("") == []
    (tmp_path / "talk.json").write_text("")
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]


def test_bytes_that_are_no_utf8() -> None:
    assert clean("a\udcff\u00e9") == "a\ufffd\u00e9"


def test_history_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = history_file()
    assert file == tmp_path / "tpirt" / "history"
    history = open_history(file)
    history.append_string("two\nlines")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(open_history(file).load_history_strings()) == ["two\nlines"]
    file.unlink()
    file.parent.rmdir()
    history.append_string("lost")  # its folder went away: the chat goes on


def test_history_where_none_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert isinstance(open_history(tmp_path / "fifo"), InMemoryHistory)
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local/state/tpirt/history"
    (tmp_path / "tpirt").write_text("in the way")
    assert isinstance(open_history(tmp_path / "tpirt" / "history"), InMemoryHistory)
    assert isinstance(open_history(None), InMemoryHistory)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without an entry
    assert history_file() is None


def test_who_is_lost(tmp_path: Path) -> None:
    deployment = load_plan(tmp_path, 12)
    states = [line.split()[-1] for line in peers_table(deployment, 1)[1:]]
    assert states == ["ok", "lost", *["ok"] * 10]
    assert not any("lost" in line for line in peers_table(deployment, None))
