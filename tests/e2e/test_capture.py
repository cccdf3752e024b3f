"""Two devices as from the README, and every packet between them."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_privacy import SECRET, leaks
from tests.support.capture import Capture, capturing
from tests.support.lan import lan
from tests.support.nightly import nightly
from tpirt.testing.models import make_model
from tpirt.text import Tokenizer
from tpirt.transport.address import DEFAULT_JOIN_PORT
from tpirt.transport.tickets import PORT_OFFSET

PEER_PORT = 50051
MASTER_NAME, PEER_NAME = "mastodon-in-the-study", "ocelot-in-the-kitchen"


def rows_of(model: Path, ids: list[int]) -> Iterator[bytes]:
    """The hidden states that the first step begins with, as they may be on a wire."""
    table = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    for row in table[ids].unbind():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield row[:8].to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("way", [nightly("--discover"), nightly("--peers"), nightly("--insecure")])
def test_a_capture_shows_nothing_beyond_handshakes_and_announcements(
    way: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "quagga-model")
    with lan(2, tmp_path) as (master, peer), capturing(master) as capture:
        master.host_name, peer.host_name = MASTER_NAME, PEER_NAME
        code = ""
        if way == "--insecure":
            peer.serve(way)
        else:
            master.good("cluster", "init")
            code = peer.join(master)
        chat = ["chat", "--model", str(model), "--prompt", SECRET, "--max-tokens", "12"]
        named = peer.address if code == "" else PEER_NAME
        options = [way] if way == "--discover" else ["--peers", named]
        out = master.good(*chat, *options, *["--insecure"] * (way == "--insecure"))
        devices = json.loads(master.good("peers", "--json", "--seconds", "1")) if code else []
        peer.stop()
    ids = Tokenizer.from_dir(model).encode(SECRET)
    texts = [SECRET, out, "quagga-model", str(tmp_path), "model.safetensors", "embed_tokens"]
    names = [MASTER_NAME, PEER_NAME, *([code, code.replace("-", "")] if code else [])]
    said = b"\n".join(map(bytes, capture.streams.values()))
    assert len(said) > 200_000  # the slice, among others
    found = leaks(said, [*texts, *names], ids, []) + [
        row for row in rows_of(model, ids) if row in said
    ]
    if way == "--insecure":
        assert found  # the search would find them
        return
    assert found == []
    check_services(capture)
    (device,) = devices
    check_announcements(bytes(capture.mdns), [*texts, MASTER_NAME], ids, device)


def check_services(capture: Capture) -> None:
    ports = (DEFAULT_JOIN_PORT, PEER_PORT, PEER_PORT + PORT_OFFSET)
    allowed = {"ARP", "IGMP", "ICMPv6", "UDP 5353", *(f"TCP {port}" for port in ports)}
    assert capture.kinds <= allowed
    for port in ports:
        assert f"TCP {port}" in capture.kinds


def check_announcements(
    said: bytes, texts: list[str], ids: list[int], device: dict[str, object]
) -> None:
    """Only what SECURITY.md names."""
    assert leaks(said, texts, ids, []) == []
    assert f"name={PEER_NAME}".encode() in said
    keys = set(re.findall(rb"[\x05-\x60]([a-z]+)=", said))
    assert keys == {b"name", b"cluster", b"version", b"protocol"}
    assert struct.pack(">H", PEER_PORT) in said
    assert device["name"] == PEER_NAME
