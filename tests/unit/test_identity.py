"""Identities on disk: where they are kept, what is refused, and what is replaced in time."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from tpirt.cli.main import main
from tpirt.cluster.discovery import client_of
from tpirt.cluster.membership import create_cluster, issuer
from tpirt.errors import IdentityError
from tpirt.identity import registry
from tpirt.identity.authority import Authority
from tpirt.identity.certificates import Certificate, Identity, new_request
from tpirt.identity.folder import config_folder
from tpirt.identity.names import MASTER, PEER, Subject, random_id
from tpirt.identity.trust import AUTHORITY_FILE, IDENTITY_FILE, REGISTRY_FILE, Trust
from tpirt.testing.identities import MadeCluster


@pytest.fixture
def cluster(tmp_path: Path) -> MadeCluster:
    return MadeCluster(tmp_path / "master")


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TPIRT_IDENTITY")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_folder() == tmp_path / ".config" / "tpirt"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert config_folder() == tmp_path / ".config" / "tpirt"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert config_folder() == tmp_path / "xdg" / "tpirt"
    monkeypatch.setenv("TPIRT_IDENTITY", str(tmp_path / "own"))
    assert config_folder() == tmp_path / "own"
    assert config_folder("given") == Path("given")


def test_without_a_home_directory_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TPIRT_IDENTITY", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(IdentityError, match="give --identity DIR, or set TPIRT_IDENTITY or XDG"):
        config_folder()
    assert Trust(PEER).identity is None  # enough for loopback


def test_files_are_private(cluster: MadeCluster, tmp_path: Path) -> None:
    cluster.peer(tmp_path / "peer")
    folders = [cluster.folder / MASTER, tmp_path / "peer" / PEER]
    files = [path for folder in folders for path in folder.iterdir()]
    assert {path.name for path in files} == {AUTHORITY_FILE, IDENTITY_FILE, REGISTRY_FILE}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


NULL = b'{"format": 1, "members": [{"name": null, "identity": "a", "joined": "", "expires": ""}]}'


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"nonsense", bytes(1000), b"-----BEGIN CERTIFICATE-----"),
        pytest.param(b"[" * 100_000, id="nested"),
        NULL,
    ],
)
def test_damaged_files_are_named(content: bytes, cluster: MadeCluster, tmp_path: Path) -> None:
    for name, load in (
        (IDENTITY_FILE, Identity.load),
        (AUTHORITY_FILE, Authority.load),
        (REGISTRY_FILE, lambda _: cluster.master.registry.members()),
    ):
        path = cluster.folder / MASTER / name
        path.write_bytes(content)
        with pytest.raises(IdentityError, match=name):
            load(path)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_not_waited_for(
    cluster: MadeCluster, make: Callable[[Path], None]
) -> None:
    trust = cluster.master
    (trust.folder / REGISTRY_FILE).unlink()
    make(trust.folder / REGISTRY_FILE)
    for use in (trust.registry.members, lambda: issuer(trust, None, lambda _: None)):
        with pytest.raises(IdentityError, match=r"members\.json: cannot be read: not a regular"):
            use()


def test_a_register_that_is_lost_is_missed(
    cluster: MadeCluster, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A new cluster has an empty one."""
    listed = "cluster", "list", "--identity", str(cluster.folder)
    assert main(listed) == 0
    assert (
        capsys.readouterr().out
        == "cluster home\nno device has joined yet; next: tpirt cluster invite\n"
    )
    path = cluster.master.folder / REGISTRY_FILE
    path.unlink()
    assert main(listed) == 2
    error = capsys.readouterr().err
    assert f"{path}: the register of devices is missing" in error
    assert "restore it from a copy, or invite every device again" in error
    issuer(cluster.master, None, lambda _: None)
    assert "devices that joined before are refused" in caplog.text
    assert cluster.master.registry.members() == []


def test_no_code_is_shown_where_the_register_cannot_be_written(
    cluster: MadeCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise IdentityError(f"{path}: cannot be written: Read-only file system")

    monkeypatch.setattr(registry, "write_private", fail)
    where = "--listen", "127.0.0.1:0", "--identity", str(cluster.folder)
    assert main(["cluster", "invite", "--minutes", "0.02", *where]) == 2
    out, err = capsys.readouterr()
    assert (out, "members.json: cannot be written: Read-only" in err) == ("", True)


@pytest.mark.parametrize("name", [IDENTITY_FILE, AUTHORITY_FILE])
def test_a_key_that_others_can_read_brings_a_warning(
    name: str, cluster: MadeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    path = cluster.master.folder / name
    load = Identity.load if name == IDENTITY_FILE else Authority.load
    for mode, warnings in ((0o600, 0), (0o644, 1), (0o644, 1)):  # once in a process
        path.chmod(mode)
        assert load(path) is not None
        assert len(caplog.messages) == warnings
    assert f"{path}: other users can read this private key; run `chmod 600 {path}`" in caplog.text


def test_warnings_of_a_command_begin_with_its_name(
    cluster: MadeCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    path = cluster.master.folder / AUTHORITY_FILE
    path.chmod(0o640)
    assert main(["cluster", "list", "--identity", str(cluster.folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("cluster home\n")
    assert err.startswith(f"tpirt: {path}")


def test_a_key_must_fit_its_certificate(cluster: MadeCluster, tmp_path: Path) -> None:
    identity = cluster.peer(tmp_path / "peer").identity
    assert identity is not None
    for key, authority, why in (
        (new_request()[0], identity.authority, "of another key"),
        (identity.key, Authority.create("other").pem, "of another authority"),
    ):
        path = tmp_path / "mixed.pem"
        Identity(path, key, identity.certificate, authority).save()
        with pytest.raises(IdentityError, match=why):
            Identity.load(path)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["localhost"],
        ["peer.0123456789abcdef.tpirt.internal"],
        ["0123456789abcdef.king.0123456789abcdef.tpirt.internal"],
        ["0123456789abcdef.peer.0123456789abcdef.tpirt.internal.evil.example"],
        ["0123456789abcdef.peer.0123456789abcdef_tpirt.internal"],
        [f"{each * 16}.peer.0123456789abcdef.tpirt.internal" for each in "ab"],
    ],
)
def test_names_that_prove_nothing(names: list[str]) -> None:
    with pytest.raises(IdentityError):
        Subject.of(names)


def test_what_is_asked_for_beside_the_key_is_not_signed(cluster: MadeCluster) -> None:
    """Names come from the master alone."""
    authority = Authority.load(cluster.folder / MASTER / AUTHORITY_FILE)
    assert authority is not None
    _, request = new_request()
    identity = random_id()
    issued = authority.issue(request, PEER, "kit\x1b[2Jchen", identity)
    assert issued.subject == (PEER, authority.cluster, identity)
    assert issued.name == "kit?[2Jchen"
    assert Certificate.read(issued.pem).subject == issued.subject
    for damaged in (b"", request[:100], request.replace(b"A", b"B")):
        with pytest.raises(IdentityError, match="certificate request"):
            authority.issue(damaged, PEER, "kitchen", identity)


def _disk_full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_masters_own_certificate_is_replaced_in_time(
    cluster: MadeCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority.load(cluster.folder / MASTER / AUTHORITY_FILE)
    before = cluster.master.identity
    assert authority is not None
    assert before is not None
    key, request = new_request()
    name, identity = before.certificate.name, before.subject.identity
    due = authority.issue(request, MASTER, name, identity, timedelta(days=29))
    Identity(before.path, key, due, authority.pem).save()
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", _disk_full)
        kept = Trust(MASTER, cluster.folder).identity  # good for 29 days more
    assert kept is not None
    assert kept.key == key
    assert "was not replaced" in caplog.text
    assert "No space left" in caplog.text
    after = Trust(MASTER, cluster.folder).identity
    assert after is not None
    assert after.subject == before.subject
    assert not after.certificate.is_due
    assert after.key != key


def test_a_master_that_lost_its_certificate_issues_itself_another(cluster: MadeCluster) -> None:
    """As after a crash within ``tpirt cluster init``; its authority is what makes it the master."""
    path = cluster.folder / MASTER / IDENTITY_FILE
    path.write_text("")
    with pytest.raises(IdentityError, match=r"damaged.*remove it.*a master issues itself another"):
        _ = Trust(MASTER, cluster.folder).identity
    path.unlink()
    issued = Trust(MASTER, cluster.folder).identity
    assert issued is not None
    assert issued.certificate.name == "home"
    again = Identity.load(path)
    assert again is not None
    assert again.subject == issued.subject


def test_a_device_is_found_by_name_or_identity(cluster: MadeCluster, tmp_path: Path) -> None:
    cluster.peer(tmp_path / "a", "pi")
    cluster.peer(tmp_path / "b", "pi")
    devices = cluster.master.registry
    first, second = devices.members()
    assert (first.name, second.name) == ("pi", "pi-2")
    assert devices.find(second.identity) == second
    with pytest.raises(IdentityError, match="no device named 'attic'; known: pi, pi-2"):
        devices.find("attic")
    devices.met(second.identity, "192.168.1.7:50051")
    assert devices.find("pi-2").address == "192.168.1.7:50051"
    assert not devices.find("pi").address


def test_the_name_of_a_revoked_device_is_free(cluster: MadeCluster, tmp_path: Path) -> None:
    cluster.peer(tmp_path / "a", "pi")
    devices = cluster.master.registry
    with pytest.raises(IdentityError, match=r"pi is the name of a device.*cluster revoke pi"):
        issuer(cluster.master, "pi", [].append)
    revoked = devices.revoke("pi")
    with pytest.raises(IdentityError, match=r"peer pi: its certificate was revoked on .*invite it"):
        client_of("pi", cluster.master)
    issuer(cluster.master, "pi", [].append)
    cluster.peer(tmp_path / "b", "pi")
    assert devices.find("pi") != revoked
    assert devices.find(revoked.identity) == revoked
    assert devices.revoke("pi").identity != revoked.identity


def test_a_second_revocation_keeps_the_date(cluster: MadeCluster, tmp_path: Path) -> None:
    cluster.peer(tmp_path / "peer")
    devices = cluster.master.registry
    devices._change(devices.find("kitchen").identity, lambda each: replace(each, revoked="2020"))
    assert devices.revoke("kitchen").revoked == "2020"
    assert devices.find("kitchen").revoked == "2020"


def test_changes_at_the_same_time_are_all_kept(cluster: MadeCluster, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        peers = list(pool.map(lambda number: cluster.peer(tmp_path / str(number)), range(8)))
    members = cluster.master.registry.members()
    names = {each.identity.subject.identity: each.identity.certificate.name for each in peers}
    assert {each.identity: each.name for each in members} == names
    assert len({each.name for each in members}) == 8


def test_insecure_by_the_environment(cluster: MadeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [("1", True), (" ON", True), ("0", False), ("", False), (" ", False), ("off", False)]
    for value, insecure in values:
        monkeypatch.setenv("TPIRT_INSECURE", value)
        trust = Trust(MASTER, cluster.folder)
        assert trust.insecure is insecure
        assert (trust.identity is None) is insecure
    monkeypatch.setenv("TPIRT_INSECURE", "maybe")
    with pytest.raises(IdentityError, match="'maybe': expected 1, or 0"):
        Trust(MASTER, cluster.folder)


def test_a_certificate_that_was_issued_while_the_clock_was_ahead_is_good(
    cluster: MadeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Ahead:
            return super().now(tz) + timedelta(days=1000)

    monkeypatch.setattr("tpirt.identity.authority.datetime", Ahead)
    issued = cluster.identity(tmp_path / "identity.pem", PEER).certificate
    assert issued._parsed.not_valid_before_utc <= datetime.now(UTC) < issued.expires


def test_half_a_cluster_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(identity: Identity) -> None:
        raise IdentityError("no space left on the device")

    trust = Trust(MASTER, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Identity, "save", full)
        with pytest.raises(IdentityError, match="no space"):
            create_cluster(trust, "home")
    assert create_cluster(trust, "home").certificate.name == "home"
