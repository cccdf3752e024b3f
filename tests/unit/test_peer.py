"""The worker process's own decisions."""

from __future__ import annotations

import io
import logging
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from tpirt.cli.main import main
from tpirt.peer import logs
from tpirt.peer.logs import logged
from tpirt.peer.process import _membership, _warning, is_loopback
from tpirt.testing.identities import MadeCluster
from tpirt.transport.address import Address

LOG = logging.getLogger("tpirt.peer")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("raspberry", False),
    ],
)
def test_only_loopback_goes_without_a_warning(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


class Gone(io.StringIO):
    """A standard error whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


class Unread(io.StringIO):
    """A pipe that is full and that nobody reads, until ``reads`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = threading.Event()

    def write(self, text: str) -> int:
        self.reads.wait()
        return super().write(text)


def test_log_is_one_printable_line_per_record_and_complete_at_the_end() -> None:
    stream = io.StringIO()
    with logged(logging.INFO, stream):
        LOG.info("serving \x1b[31m%s", "a\nb")
        LOG.debug("left out")
        LOG.warning("last")
    assert stream.getvalue() == "serving ?[31ma?b\nlast\n"


def test_log_goes_nowhere_when_its_reader_has_left() -> None:
    with logged(logging.INFO, Gone()):
        LOG.info("serving")


def test_log_that_nobody_reads_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST_WAITING", 2)
    monkeypatch.setattr(logs, "_FLUSH_S", 0.01)
    stream = Unread()
    with logged(logging.INFO, stream):
        for number in range(10):  # the writer takes one, two wait, the others are dropped
            LOG.info("event %d", number)
    stream.reads.set()


def test_command_keeps_its_exit_code_when_standard_error_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    assert main(["info", "--model", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("days", "level", "expected"),
    [
        (1, logging.INFO, "kitchen serves the master of its cluster"),
        (-1, logging.WARNING, "by this device's clock"),
    ],
)
def test_certificate_that_is_not_valid_by_the_clock(
    tmp_path: Path, days: int, level: int, expected: str
) -> None:
    identity = MadeCluster(tmp_path / "master").peer(tmp_path, valid=timedelta(days=days)).identity
    assert identity is not None
    said, text = _membership(identity.certificate)
    assert said == level
    assert expected in text


@pytest.mark.parametrize(
    ("host", "hosts", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"], ""),
        ("localhost", ["::1", "127.0.0.1"], ""),
        ("raspberry", ["127.0.1.1"], "raspberry is 127.0.1.1 on this device"),
        ("raspberry", ["127.0.1.1", "192.168.1.7"], "INSECURE: raspberry:1 is served"),
        ("0.0.0.0", ["::"], "INSECURE: 0.0.0.0:1 is served"),
        ("fe80::1%eth0", ["fe80::1%eth0"], "INSECURE: [fe80::1%eth0]:1 is served"),
    ],
)
def test_who_can_connect_is_said(host: str, hosts: list[str], expected: str) -> None:
    warning = _warning(Address(host, 1), hosts)
    assert warning.startswith(expected)
    assert bool(warning) == bool(expected)
