"""How devices that were found are shown."""

from __future__ import annotations

import json

import pytest

from tpirt.cli import devices
from tpirt.cluster.discovery import FOREIGN, OURS, Sighting
from tpirt.identity.registry import Member
from tpirt.protocol.messages import HelloReply, StatusReply, StoredModel

HELLO = HelloReply(7, "0.1.0", "vm", "id", 2 << 30, 4 << 30, 0, 2, 4, True, False, 1)
STATUS = StatusReply(50 << 30, 0.25, (StoredModel("Llama-3", 2, 3 << 30),), "disk full", 7200)
MEMBER = Member("kitchen", "ab", "", "2027-01-02T00:00:00Z", "", "", "2026-01-02T03:04:05Z")
BUSY = HelloReply(**{**vars(HELLO), "busy": True, "busy_with": "laptop", "busy_s": 60})
FOUND = [
    Sighting("kitchen", "ab", "10.0.0.7:50051", OURS, "0.1.0", "", HELLO, STATUS, MEMBER),
    Sighting("study", "cd", "10.0.0.8:50051", OURS, "", "busy with laptop", BUSY, STATUS, MEMBER),
    Sighting("attic", "ef", "", OURS, reason="not found", member=MEMBER),
    Sighting("next-door", "12", "10.0.0.9:1", FOREIGN, "0.1.0", "not trusted: another cluster"),
]


@pytest.mark.parametrize("columns", [40, 80, None])
def test_tables_fit(
    columns: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "width", lambda _: columns)
    devices.show_peers(FOUND, [], json_wanted=False)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= (columns or 1000)
    for word in ("kitchen", "10.0.0.7:50051", "2 GiB", "50 GiB", "has Llama-3", "free", "not used"):
        assert word in shown
    assert ("device kitchen" in shown) == (columns == 40)
    devices.show_status(FOUND[:3], ["a note"], json_wanted=False)
    out, err = capsys.readouterr()
    assert err == "tpirt: a note\n"
    for line in (
        "kitchen: 2 slices of Llama-3, 3 GiB",
        "kitchen: last error 2 hours ago: disk full",
        "kitchen: certificate until 2027-01-02",
        "attic: not found",
        "attic: met last on 2026-01-02 at 03:04 UTC",
    ):
        assert line in out.splitlines()


def test_json_has_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    devices.show_peers(FOUND, [], json_wanted=True)
    kitchen, study, attic, stranger = json.loads(capsys.readouterr().out)
    assert kitchen["models"] == [{"name": "Llama-3", "slices": 2, "bytes": 3 << 30}]
    assert (study["state"], study["busy_with"], study["busy_s"]) == ("busy", "laptop", 60)
    assert (attic["state"], attic["certificate_ends"]) == ("no answer", MEMBER.expires)
    assert (stranger["state"], stranger["cluster"]) == ("not used", "another cluster")


def test_which_are_used_and_why_not_the_others() -> None:
    assert list(devices.describe_choice(FOUND)) == [
        "using kitchen (10.0.0.7:50051)",
        "not using study: busy with laptop",
        "not using attic: not found",
        "not using next-door: not trusted: another cluster",
    ]
