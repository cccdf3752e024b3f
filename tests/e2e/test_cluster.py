"""A cluster from the command line: from init to revoke, and what a wiretap sees of it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.support.tap import Tap
from tpirt.config import ModelConfig
from tpirt.testing.models import make_model
from tpirt.testing.processes import killed_at_exit, start_cli
from tpirt.transport.tickets import PORT_OFFSET

SECRET = "Quokkas whisper 7319 zeppelin secrets"
DEADLINE_S = 60


def network_address() -> str:
    """An address of this machine beyond loopback."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family is socket.AF_INET and not each.address.startswith("127."):
                return each.address
    pytest.skip("this machine has no address beyond loopback")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


class Devices:
    """A master and peers, each with its own folder of keys."""

    def __init__(self, root: Path):
        self.root = root
        self.host = network_address()

    def env(self, name: str) -> dict[str, str]:
        return {"TPIRT_IDENTITY": str(self.root / name), "TPIRT_INSECURE": ""}

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        return start_cli(*arguments, env=self.env(name))

    def run(self, name: str, *arguments: str) -> tuple[int, str, str]:
        with killed_at_exit(self.start(name, *arguments)) as process:
            out, err = process.communicate(timeout=DEADLINE_S)
        return process.returncode, out, err

    def good(self, name: str, *arguments: str) -> str:
        code, out, err = self.run(name, *arguments)
        assert code == 0, err
        return out

    @contextmanager
    def peer(self, name: str, *options: str) -> Iterator[str]:
        """Serve beyond loopback, at a port whose neighbour is free; yields the address."""
        port = _two_free_ports(self.host)
        listen = ("peer", "--listen", f"{self.host}:{port}", "--threads", "1", "--no-announce")
        process = self.start(name, *listen, "--store", str(self.root / f"{name}.store"), *options)
        with killed_at_exit(process):
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on"), (line, process.communicate()[1])
            yield line.split()[2]

    def generate(self, model: Path, peers: str, *options: str) -> tuple[int, str, str]:
        return self.run(
            "master",
            *("generate", "--model", str(model), "--peers", peers, "--prompt", SECRET),
            *("--threads", "1", "--max-tokens", "8", "--dtype", "float32", "--quiet"),
            *("--temperature", "0", "--store", str(self.root / "master.store"), *options),
        )

    def invited(self, *options: str) -> tuple[subprocess.Popen[str], str]:
        """Open an invitation; returns it, and what to join by."""
        process = self.start("master", "cluster", "invite", "--listen", f"{self.host}:0", *options)
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"tpirt peer --join (\S+)", line):
                return process, found[1]
        raise AssertionError(process.communicate())


def _two_free_ports(host: str) -> int:
    while True:
        with socket.create_server((host, 0)) as first:
            port: int = first.getsockname()[1]
            try:
                socket.create_server((host, port + PORT_OFFSET)).close()
            except (OSError, OverflowError):
                continue
            return port


def test_from_nothing_to_an_answer_and_what_a_wiretap_sees(model: Path, tmp_path: Path) -> None:
    """Init, invite, join, generate; rotate, generate again; revoke."""
    devices = Devices(tmp_path)
    assert "next: tpirt cluster invite" in devices.good(
        "master", "cluster", "init", "--name", "home"
    )
    again = devices.run("master", "cluster", "init")
    assert again[0] == 2
    assert "is the master of cluster home already" in again[2]

    name = "kitchen-of-Ottoline"
    invitation, where = devices.invited("--name", name)
    with killed_at_exit(invitation), devices.peer("kitchen", "--join", where) as address:
        out, err = invitation.communicate(timeout=DEADLINE_S)
        assert invitation.returncode == 0, err
        assert f"{name} has joined" in out
        assert address in devices.good("master", "cluster", "list")

        tap = Tap(address)
        try:
            code, answer, err = devices.generate(model, tap.address, "--json")
        finally:
            tap.close()
        assert (code, err) == (0, "")
        assert tap.taken == 3  # a handshake, gRPC, and the connection for frames
        there, back = bytes(tap.there), bytes(tap.back)
        gate = load_file(model / "model.safetensors")["model.layers.2.mlp.gate_proj.weight"]
        rows = [row.float().numpy().tobytes() for row in gate[-20:]]
        assert len(there) > 100_000  # the slice among others
        config = ModelConfig.from_dir(model).to_json().encode()
        for seen in (there, back):
            assert not any(row[:64] in seen for row in rows)
            for plain in (config[:40], b"tpirt.v1", b"HelloRe", SECRET.encode(), name.encode()):
                assert plain not in seen, plain
        expected = json.loads(answer)["token_ids"]

        code, answer, err = devices.generate(model, address, "--json", "--explain")
        assert code == 0, err
        assert json.loads(answer)["token_ids"] == expected
        assert re.search(
            r"links 0-1: sealed, (AES-GCM|ChaCha20-Poly1305), [\d.]+ us per 16 KiB", err
        )

        assert f"{name}: replaced, until" in devices.good("master", "cluster", "rotate")
        code, answer, err = devices.generate(model, address, "--json")
        assert code == 0, err
        assert json.loads(answer)["token_ids"] == expected

        code, _, err = devices.generate(model, address, "--insecure")
        assert code == 2
        assert "it uses TLS, and this device does not; leave out --insecure" in err

        devices.good("master", "cluster", "revoke", name)
        code, _, err = devices.generate(model, address)
        assert code == 2
        assert f"the certificate of {name} was revoked" in err
        assert "revoked" in devices.good("master", "cluster", "list")
        code, out, err = devices.run("master", "cluster", "rotate", name)
        assert (code, out) == (2, "")
        assert f"{name} was revoked on 20" in err

    with devices.peer("kitchen"):  # the certificate is kept
        pass
    code, _, err = devices.run("late", "peer", "--listen", "127.0.0.1:0", "--join", where)
    assert code == 3
    assert f"cannot join at {where.partition('/')[0]}" in err


def test_without_a_certificate(model: Path, tmp_path: Path) -> None:
    devices = Devices(tmp_path)
    code, _, err = devices.run("kitchen", "peer", "--listen", f"{devices.host}:0")
    assert code == 2
    for way in ("cluster invite", "--listen 127.0.0.1", "--insecure"):
        assert way in err
    with devices.peer("kitchen", "--insecure", "--quiet") as address:
        code, _, err = devices.generate(model, address)
        assert code == 2
        assert "this device has no certificate" in err
        code, _, err = devices.generate(model, address, "--insecure")
        assert code == 0
        assert f"INSECURE: peer {address} is used without encryption" in err


def test_workers_of_a_cluster_link_with_each_other(model: Path, tmp_path: Path) -> None:
    devices = Devices(tmp_path)
    devices.good("master", "cluster", "init")
    invitation, where = devices.invited()
    with killed_at_exit(invitation), devices.peer("first", "--join", where) as first:
        invitation.communicate(timeout=DEADLINE_S)
        invitation, where = devices.invited()
        with killed_at_exit(invitation), devices.peer("second", "--join", where) as second:
            invitation.communicate(timeout=DEADLINE_S)
            code, _, err = devices.generate(
                model, f"{first},{second}", "--explain", "--collective", "one-shot"
            )
            assert code == 0, err
            assert re.search(r"links 0-1, 0-2, 1-2: sealed", err), err
