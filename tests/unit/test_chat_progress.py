"""Progress on terminals and elsewhere, with a clock of the test's own."""

from __future__ import annotations

import io
import logging
import re
import threading

import pytest

from tpirt.chat.progress import ConsoleProgress
from tpirt.cli.options import noted
from tpirt.types import Progress


class Terminal(io.StringIO):
    """Claims to be a terminal, and tells when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        count = super().write(text)
        self.written.set()
        return count


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def work(progress: ConsoleProgress, clock: Clock, seconds: int, stage: str = "slicing") -> None:
    for second in range(seconds + 1):
        progress(Progress(stage, second << 20, seconds << 20, detail="rank 0"))
        clock.now += 1


def test_elsewhere_a_line_now_and_then() -> None:
    out, clock = io.StringIO(), Clock()
    progress = ConsoleProgress(stream=out, clock=clock)
    work(progress, clock, 2)
    assert out.getvalue() == ""
    work(progress, clock, 12, "sending slice")
    assert out.getvalue().splitlines() == [
        "sending slice, rank 0: 3 MiB of 12 MiB, 1 MiB/s, 9 s left",
        "sending slice, rank 0: 8 MiB of 12 MiB, 1 MiB/s, 4 s left",
    ]


def test_a_reconnect_is_a_line_that_stays() -> None:
    for out in (io.StringIO(), Terminal()):
        progress = ConsoleProgress(stream=out)
        progress.before = lambda out=out: out.write("|")  # type: ignore[misc]
        progress(Progress("loading weights", 1, 2))
        progress(Progress("reconnected", 2, 2, "peers", "computing 312 tokens again"))
        progress(Progress("reconnected", 1, 1, "peers"))
        progress.close()
        assert out.getvalue() == (
            "|reconnected to 2 peers; computing 312 tokens again\n|reconnected to 1 peer\n"
        )


def test_a_rate_counts_from_where_a_rank_began() -> None:
    out, clock = io.StringIO(), Clock()
    progress = ConsoleProgress(stream=out, clock=clock)
    progress(Progress("slicing", 90, 1000, "blocks", "rank 0"))
    clock.now += 4
    progress(Progress("slicing", 0, 1000, "blocks", "rank 1"))
    clock.now += 6
    progress(Progress("slicing", 100, 1000, "blocks", "rank 0"))
    clock.now += 5
    progress(Progress("slicing", 20, 50000, "blocks", "rank 1"))
    assert out.getvalue().splitlines() == [
        "slicing, rank 1: 0 of 1000 blocks",
        "slicing, rank 0: 100 of 1000 blocks, 1 blocks/s, 15 min left",
        "slicing, rank 1: 20 of 50000 blocks, 1.8 blocks/s, 7.6 h left",
    ]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out, clock = Terminal(), Clock()
    with ConsoleProgress(stream=out, clock=clock) as progress:
        progress(Progress("starting peers", 0, 1, "peers"))
        clock.now += 4
        progress(Progress("starting peers", 0, 1, "peers"))
        clock.now += 9
        progress(Progress("waiting", 0, 0))
        clock.now += 9
        progress(Progress("waiting", 0, 0))
    assert out.getvalue() == "starting peers: 0 of 1 peers\nwaiting: ...\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, clock = Terminal() if terminal else io.StringIO(), Clock()
    with ConsoleProgress(quiet=True, stream=out, clock=clock) as progress:
        work(progress, clock, 60)
    assert out.getvalue() == ""


def test_what_is_over_at_once_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with ConsoleProgress(stream=out) as progress:
        for rank in range(20):
            progress(Progress("loading weights", 5, 5, detail=f"rank {rank}"))
        progress(Progress("prefill", 0, 9, "tokens"))
        progress(Progress("prefill", 9, 9, "tokens"))
    assert out.getvalue() == ""


@pytest.mark.parametrize("by_itself", [True, False])
def test_what_lasts_is_shown_and_erased(monkeypatch: pytest.MonkeyPatch, by_itself: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    progress = ConsoleProgress(stream=out)
    reports = [Progress("slicing", 1 << 20, 4 << 20, detail=f"rank {r}") for r in range(2)]
    threads = [threading.Thread(target=progress, args=[report]) for report in reports]
    for thread in threads:
        thread.start()
    assert out.written.wait(30)
    for thread in threads:
        thread.join()
    if by_itself:
        for rank in range(2):
            progress(Progress("slicing", 4 << 20, 4 << 20, detail=f"rank {rank}"))
    else:
        progress.close()
    drawn = out.getvalue()
    assert "slicing, rank 0" in drawn
    assert "1 MiB of 4 MiB" in drawn
    assert drawn.rstrip("\r").endswith("\x1b[2K")  # the last thing done is to erase a line
    assert "\x1b[?25l" not in drawn  # and the cursor was never hidden
    progress.close()
    assert out.getvalue() == drawn


def test_a_new_stage_replaces_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    with ConsoleProgress(stream=out) as progress:
        progress(Progress("starting peers", 0, 3, "peers"))
        assert out.written.wait(30)
        progress(Progress("loading weights", 1, 4, detail="rank 0"))
        progress._show.close()  # type: ignore[union-attr]
    assert "loading weights" in out.getvalue().rpartition("\r")[0]
    last = out.getvalue().rpartition("loading weights")[2]
    assert "starting peers" not in last


def test_many_ranks_have_few_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    with ConsoleProgress(stream=out) as progress:
        for rank in range(20):
            progress(Progress("loading weights", 1, 4, detail=f"rank {rank}"))
        assert out.written.wait(30)
    assert "rank 7 " in out.getvalue()
    assert "rank 8 " not in out.getvalue()


def test_notes_are_lines_of_their_own_and_quiet_shows_none() -> None:
    out = io.StringIO()
    with ConsoleProgress(stream=out) as progress, noted(progress):
        logging.getLogger("tpirt.cluster.provision").info("new slice of %s", "m\x1b[2J")
        logging.getLogger("tpirt.cluster.provision").debug("left out")
    assert out.getvalue() == "tpirt: new slice of m?[2J\n"
    with ConsoleProgress(quiet=True, stream=out) as progress, noted(progress):
        progress.note("unseen")
    assert "unseen" not in out.getvalue()


@pytest.mark.parametrize(("columns", "extras"), [(40, 0), (60, 2), (120, 3)])
def test_figures_are_whole_at_any_width(
    monkeypatch: pytest.MonkeyPatch, columns: int, extras: int
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    with ConsoleProgress(stream=out) as progress:
        for done in (64, 65):
            progress(Progress("loading weights", done << 20, 1 << 30, detail="rank\x1b[2J 10"))
        assert out.written.wait(30)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", drawn)]
    assert max(map(len, lines)) <= columns
    assert any("65 MiB of 1 GiB" in line for line in lines)
    assert {"loading", "weights,", "rank?[2J", "10"} <= set(drawn.split())
    assert ("iB/s" in drawn, "left" in drawn) == (extras > 1, extras > 1)
    assert ("\u2501" in drawn) == (extras > 2)
    assert "\u2026" not in drawn


@pytest.mark.parametrize(("unit", "is_work"), [("peers", False), ("pieces", True)])
def test_only_work_has_a_rate(monkeypatch: pytest.MonkeyPatch, unit: str, is_work: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    bars, lines, clock = Terminal(), io.StringIO(), Clock()
    for out in (bars, lines):
        with ConsoleProgress(stream=out, clock=clock) as progress:
            for done in (0, 1, 2):
                progress(Progress("starting", done, 9, unit))
                clock.now += 5
            assert out is lines or bars.written.wait(30)
        assert "2 of 9" in out.getvalue()
        assert (f"{unit}/s" in out.getvalue(), "left" in out.getvalue()) == (is_work, is_work)


def test_lines_of_a_narrow_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("tpirt.chat.progress.width", lambda _: 40)
    out, clock = Terminal(), Clock()
    progress = ConsoleProgress(stream=out, clock=clock)
    work(progress, clock, 12, "sending slice")
    assert out.getvalue().splitlines()[:2] == [
        "sending slice, rank 0: 3 MiB of 12 MiB,",
        "  1 MiB/s, 9 s left",
    ]


def test_bars_of_a_terminal_without_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    monkeypatch.setattr(Terminal, "encoding", "latin-1")
    with ConsoleProgress(stream=out) as progress:
        progress(Progress("slicing", 1, 4))
        assert out.written.wait(30)
    assert out.getvalue().isascii()
    assert "-----" in out.getvalue()
