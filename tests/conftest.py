"""What all tests share: one compute thread, repeatable hypothesis runs."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings

from tpirt.cluster import collective_policy
from tpirt.collectives.cost_model import Topology

# Two pools of threads that spin on the same cores only slow each other down.
torch.set_num_threads(1)

# Under nohup SIGHUP is ignored, and whatever the tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples on every run: a test that fails sometimes helps nobody.
settings.register_profile("tpirt", deadline=None, derandomize=True)
settings.load_profile("tpirt")


@pytest.fixture
def in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every step of several tokens go through the layers in two halves."""
    monkeypatch.setattr(collective_policy, "_WORTH_HIDING_S", 0.0)
    monkeypatch.setattr(collective_policy, "_LEAST_SPLIT", 2)
    monkeypatch.setattr(Topology, "on_loopback", False)
