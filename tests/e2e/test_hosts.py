"""``launch_hosts.sh`` against a real sshd: this user's own, on loopback, gone with the test."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tpirt.testing.processes import (
    DEADLINE_S,
    descendants,
    killed_at_exit,
    run_cli,
    survivors,
    wait_for,
)

ROOT = Path(__file__).parents[2]
BEAT_S = 5.0
SCRIPT = ROOT / "scripts" / "launch_hosts.sh"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Host:
    """A way into this machine by ssh, and a "home" there that has a copy of the repository."""

    address: str
    config: Path
    sshd: psutil.Process


def _key(file: Path) -> str:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(file)], check=True
    )
    return file.with_suffix(".pub").read_text().strip()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs ssh and sshd (on Debian: openssh-client, openssh-server)")
    folder = tmp_path_factory.mktemp("sshd")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd started by root insists on it
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    host_key, user_key = _key(folder / "host"), _key(folder / "user")
    (folder / "authorized_keys").write_text(user_key + "\n")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (folder / "sshd_config").write_text(
        f"""
        ListenAddress 127.0.0.1:{port}
        HostKey "{folder}/host"
        AuthorizedKeysFile "{folder}/authorized_keys"
        PidFile none
        StrictModes no
        UsePAM no
        PasswordAuthentication no
        KbdInteractiveAuthentication no
        SetEnv "TPIRT_VENV={sys.prefix}" "XDG_CACHE_HOME={folder}/cache"
        """
    )
    (folder / "ssh_config").write_text(
        f"""
        IdentityFile "{folder}/user"
        IdentitiesOnly yes
        UserKnownHostsFile "{folder}/known_hosts"
        GlobalKnownHostsFile none
        """
    )
    log = folder / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=errors
        )
    try:
        wait_for(lambda: "Server listening" in log.read_text() or process.poll() is not None)
        if process.poll() is not None:
            pytest.skip(f"sshd does not start here: {log.read_text().strip()}")
        ssh = ["ssh", "-F", str(folder / "ssh_config"), "-o", "BatchMode=yes", "-p", str(port)]
        if subprocess.run([*ssh, "127.0.0.1", "true"], stdin=subprocess.DEVNULL).returncode:
            pytest.skip(f"this user cannot come in by ssh: {log.read_text().strip()}")
        yield Host(f"127.0.0.1:{port}", folder / "ssh_config", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The repository as the hosts find it: under a name with a space."""
    place = tmp_path / "a repository"
    place.symlink_to(ROOT)
    return place


Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(host: Host, place: Path, tmp_path: Path) -> Iterator[Launch]:
    """Starts the script with a hosts file of these lines; stops what a test left running."""
    started: list[subprocess.Popen[str]] = []

    def start(*lines: str) -> subprocess.Popen[str]:
        text = "".join(f"{line}\n" for line in lines)
        escaped = str(place).replace(" ", "\\ ")
        (tmp_path / "hosts").write_text(text.format(host=host.address, place=escaped))
        started.append(
            subprocess.Popen(
                [str(SCRIPT), "--ssh-config", str(host.config), str(tmp_path / "hosts")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with killed_at_exit(process):
            pass


def remote_side(host: Host) -> list[psutil.Process]:
    """What runs on the "hosts": everything that came through sshd."""
    return descendants(host.sshd.pid)


def until_listening(process: subprocess.Popen[str]) -> tuple[list[str], list[str]]:
    """The lines up to the one with ``--peers``; and the addresses in that."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith("--peers "):
            return lines, line.split()[1].split(",")
    raise AssertionError((lines, process.communicate()))


TWO = (
    "# two peers on one host",
    "{host} 127.0.0.1:0 {place} --threads 1 # the first",
    "",
    "{host} 127.0.0.1:0 {place} --threads 1 --memory 2GB",
)


def test_a_model_on_two_hosts(launch: Launch, host: Host, tmp_path: Path) -> None:
    process = launch(*TWO)
    lines, peers = until_listening(process)
    for number, peer in enumerate(peers, 1):
        assert any(line.startswith(f"127.0.0.1#{number} | listening on {peer}") for line in lines)
    done = run_cli(
        *("generate", "--peers", ",".join(peers), "--prompt", "Hello!", "--max-tokens", "4"),
        *("--threads", "1", "--store", str(tmp_path / "slices")),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    left = [*remote_side(host), *descendants(process.pid)]
    assert sum("--until-stdin-closes" in p.cmdline() for p in left) >= 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "stopping" in err
    assert re.search(r"^127\.0\.0\.1#2 \| ", out, re.MULTILINE)
    assert survivors(left) == []


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("SIGTERM", marks=pytest.mark.nightly),  # as SIGINT above
        pytest.param("SIGHUP", marks=pytest.mark.nightly),
        "SIGKILL",
    ],
)
def test_no_end_leaves_a_peer(launch: Launch, host: Host, how: str) -> None:
    process = launch(*TWO)
    until_listening(process)
    left = [*remote_side(host), *descendants(process.pid)]
    number = signal.Signals[how]
    process.send_signal(number)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == (-9 if how == "SIGKILL" else 128 + number)
    assert survivors(left, DEADLINE_S) == []


def test_a_peer_that_ends_ends_all(launch: Launch, host: Host) -> None:
    process = launch(*TWO)
    _, peers = until_listening(process)
    left = [*remote_side(host), *descendants(process.pid)]
    port = int(peers[1].rpartition(":")[2])
    (second,) = (p for p in left if any(c.laddr[1] == port for c in p.net_connections("tcp")))
    second.kill()
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3
    assert "127.0.0.1#2: the peer was killed, or the connection was lost" in err
    assert survivors(left) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{host} 127.0.0.1:0 /nowhere", "the peer did not start, exit code 127: .*No such file"),
        ("127.0.0.1:1 127.0.0.1:0 {place}", "ssh to 127.0.0.1 failed: .*refused"),
        ("nobody@{host} 127.0.0.1:0 {place}", "ssh to nobody@127.0.0.1 failed: "),
    ],
    ids=["place", "port", "user"],
)
def test_why_one_fails(launch: Launch, line: str, message: str) -> None:
    began = time.monotonic()
    process = launch(line)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert time.monotonic() - began < BEAT_S  # it is told at once, not at the next beat
    assert process.returncode == 3
    assert re.search(rf"launch_hosts\.sh: 127\.0\.0\.1: {message}", err), err


def test_one_that_fails_stops_all(launch: Launch, host: Host) -> None:
    process = launch(TWO[1], "{host} 127.0.0.1:0 {place} --nonsense")
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3
    assert "127.0.0.1#2: the peer did not start, exit code 2: tpirt peer: error: " in err
    wait_for(lambda: not remote_side(host), "the end of the other")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "there is no host in it"),
        (["# nobody", ""], "there is no host in it"),
        (["\ufeff# after a byte order mark"], "there is no host in it"),
        (["", "box /srv"], "line 2: expected LISTEN_HOST[:PORT], got '/srv'"),
        (["box 127.0.0.1:65536"], "line 1: expected LISTEN_HOST[:PORT], got '127.0.0.1:65536'"),
        (["box:ssh 127.0.0.1:1"], r"line 1: expected [USER@]HOST[:SSH_PORT], got 'box:ssh'"),
        (["box:70000 127.0.0.1:1"], "line 1: '70000' is no port"),
        (["-oProxyCommand=true 127.0.0.1:1"], "line 1: expected [USER@]HOST[:SSH_PORT], got '-o"),
    ],
)
def test_wrong_hosts_files(lines: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("\n".join(lines))
    done = subprocess.run(
        [str(SCRIPT), str(file)], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
