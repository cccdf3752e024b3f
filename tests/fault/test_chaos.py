"""The faults of :mod:`bench.chaos`: what is drawn, and some rounds of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.lib.chaos_faults import KINDS, PEERS, PHASES, draw
from bench.lib.jumping_clock import set_offset
from bench.net.namespace import Namespace
from bench.net.spec import NoRightsError
from tests.support.nightly import nightly
from tpirt.testing.processes import run_python

ROOT = Path(__file__).parents[2]


def test_a_seed_draws_the_same_faults_and_many_draw_all() -> None:
    assert draw(7) == draw(7)
    faults = [fault for seed in range(300) for fault in draw(seed)]
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.phase for fault in faults} == set(PHASES)
    assert {fault.peer for fault in faults} == set(range(1, PEERS + 1))


def test_a_clock_jumps_for_tpirt_alone(tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    set_offset(offset, 86_400.0)
    (tmp_path / "looks.py").write_text(
        "import time\n"
        "scope = {'__name__': 'tpirt.protocol.link', 'time': time}\n"
        "print(time.time(), eval('time.time()', scope))\n"
    )
    command = [sys.executable, "-m", "bench.lib.jumping_clock", str(offset), "looks"]
    paths = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    right, wrong = map(float, done.stdout.split())
    assert right == pytest.approx(time.time(), abs=60)
    assert wrong == pytest.approx(right + 86_400, abs=1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seeds", [nightly("1:4")])
def test_rounds_of_seeded_faults(seeds: str) -> None:
    try:
        Namespace().close()
    except NoRightsError as exc:
        pytest.skip(str(exc))
    done = run_python(*("-m", "bench.chaos", "--seeds", seeds), text=True, cwd=ROOT, timeout_s=550)
    assert done.returncode == 0, done.stderr
