"""What others announce: bounded and printable, whatever it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpirt.transport.address import Address
from tpirt.transport.mdns import Notice, read_notice

LABEL = "0123456789abcdef"


def test_a_notice() -> None:
    text = {b"name": b"kitchen", b"cluster": b"aa", b"version": b"0.1", b"protocol": b"7"}
    hosts = ["10.0.0.7", "fe80::1%eth0", "127.0.0.1", "::1", "0.0.0.0", "224.0.0.1", "kitchen"]
    places = (Address("10.0.0.7", 50051), Address("fe80::1%eth0", 50051))
    notice = read_notice(LABEL, 50051, hosts, {**text, b"other": None})
    assert notice == Notice(LABEL, "kitchen", "aa", "0.1", "7", places)
    assert read_notice(LABEL, 0, hosts, {}) == Notice(LABEL, "", "", "", "")


def test_a_hostile_notice() -> None:
    text = {b"name": b"\x1b[2J\xff\n" + b"x" * 9_000, b"version": None}
    notice = read_notice(LABEL, 1, [f"10.0.1.{n}" for n in range(250)], text)
    assert notice.name.startswith("?[2J\ufffd?xxx")
    assert len(notice.name) == 64
    assert len(notice.addresses) == 8


@given(st.dictionaries(st.sampled_from((b"name", b"cluster", b"version")), st.binary()))
def test_any_bytes(text: dict[bytes, bytes | None]) -> None:
    notice = read_notice(LABEL, 1, [], text)
    for field in (notice.name, notice.cluster, notice.version):
        assert len(field) <= 64
        assert field.isprintable()
