"""What all tests share: one compute thread, repeatable hypothesis runs."""

from __future__ import annotations

import signal

import torch
from hypothesis import settings

# Two pools of threads that spin on the same cores only slow each other down.
torch.set_num_threads(1)

# Under nohup SIGHUP is ignored, and whatever the tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples on every run: a test that fails sometimes helps nobody.
settings.register_profile("tpirt", deadline=None, derandomize=True)
settings.load_profile("tpirt")
