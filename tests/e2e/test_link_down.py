"""A network that is gone for some seconds, as when Wi-Fi roams: many prompts go on."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from bench.net.namespace import INTERFACE
from tests.support.lan import lan
from tests.support.nightly import nightly
from tpirt.testing.models import make_model

DOWN_S = 6.0  # TCP sends again after up to as long again
PROMPTS, TOKENS = 32, 24


@pytest.mark.timeout(120)
@pytest.mark.parametrize("side", [nightly("master"), nightly("peer")])
def test_a_link_is_down_for_some_seconds(side: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"number {i} of many\n" for i in range(PROMPTS)), encoding="utf-8")
    arguments = ["generate", "--model", str(model), "--prompts", str(prompts), "--threads", "1"]
    arguments += ["--max-tokens", str(TOKENS), "--temperature", "0", "--dtype", "float32"]
    with lan(3, tmp_path) as (master, *peers):
        expected = [json.loads(line) for line in master.good(*arguments).splitlines()]
        for peer in peers:
            peer.serve("--threads", "1", "--insecure", "--no-announce")
        addresses = ",".join(f"{peer.address}:50051" for peer in peers)
        device = master if side == "master" else peers[0]
        many = master.start(
            *arguments, "--insecure", "--peers", addresses, "--quiet", stderr=subprocess.DEVNULL
        )
        assert many.stdout is not None
        first = many.stdout.readline()
        device.ip("link", "set", "dev", INTERFACE, "down")
        time.sleep(DOWN_S)
        device.ip("link", "set", "dev", INTERFACE, "up")
        rest = many.stdout.read()
        assert many.wait() == 0
    answers = [json.loads(line) for line in (first + rest).splitlines()]
    assert [each["text"] for each in answers] == [each["text"] for each in expected]
