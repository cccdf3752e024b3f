"""When silence is suspicious."""

from __future__ import annotations

import random

from tpirt.protocol.suspicion import Suspicion

INTERVAL_S, TIMEOUT_S = 2.0, 20.0


def test_nothing_is_suspected_before_a_link_is_known() -> None:
    suspicion = Suspicion(INTERVAL_S, TIMEOUT_S)
    for _ in range(7):
        assert suspicion.limit_s == TIMEOUT_S
        suspicion.heard(INTERVAL_S)


def test_a_dead_peer_is_noticed_sooner_on_a_calm_link() -> None:
    suspicion, chance = Suspicion(INTERVAL_S, TIMEOUT_S), random.Random(1)
    for _ in range(1000):
        suspicion.heard(INTERVAL_S + chance.uniform(0, 0.05))
    assert suspicion.limit_s == TIMEOUT_S / 2


def test_a_jittery_link_raises_no_false_alarm() -> None:
    suspicion, chance = Suspicion(INTERVAL_S, TIMEOUT_S), random.Random(1)
    limits = set()
    for _ in range(20_000):  # eleven hours
        gap_s = INTERVAL_S + chance.expovariate(2.0)
        if chance.random() < 0.003:  # a burst of interference
            gap_s += chance.uniform(1, 4)
        assert gap_s < suspicion.limit_s
        suspicion.heard(gap_s)
        limits.add(suspicion.limit_s)
    assert min(limits) < TIMEOUT_S == max(limits)
