"""Fuzzed messages at every entry point: see :mod:`bench.hostile`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.hostile import network_address, run
from tests.support.nightly import nightly
from tpirt.errors import ConfigError


@pytest.mark.timeout(4000)
@pytest.mark.parametrize("messages", [nightly(200), nightly(100_000)])
async def test_hostile_input_is_refused_and_others_are_served(
    messages: int, tmp_path: Path
) -> None:
    try:
        network_address()
    except ConfigError as exc:
        pytest.skip(str(exc))
    found = await run(messages, seed=messages, minutes=60, folder=tmp_path)
    late = [each for each in found["wrong"] if "waited" in each]  # the machine may be busy
    assert found["wrong"] == late
    assert sum(row.tally.messages for row in found["rows"]) >= messages
