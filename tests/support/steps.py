"""Steps whose times and memory do not depend on the machine."""

from __future__ import annotations

import pytest

from tpirt.engine.drafts.allowance import Allowance
from tpirt.engine.step_costs import StepCosts
from tpirt.model.kv_store import KVNeed
from tpirt.planning import Deployment


def take_free_rows(patch: pytest.MonkeyPatch, free: int = 1 << 20) -> None:
    """Have steps expected to take a second: then all guesses pay.

    Args:
        patch: of the test.
        free: rows of which that is so; with more, the time grows in proportion.
    """
    patch.setattr(StepCosts, "seconds", lambda _, rows: max(1.0, rows / free))
    # What was saved of this machine's time is not asked: there is always a second to lose.
    patch.setattr(Allowance, "save", lambda self, *_: setattr(self, "left_s", 1.0))
    patch.setattr(StepCosts, "is_sure", lambda *_: True)
    patch.setattr(StepCosts, "most_tried", lambda _, limit: limit)


def have_memory_for(patch: pytest.MonkeyPatch, positions: int) -> None:
    """Bound the KV stores; where weights can be given up, there is room for twice as many."""

    def has_room(_: Deployment, need: KVNeed, *__: int, displacing: bool) -> bool:
        return need.held <= positions * (1 + displacing)

    patch.setattr(Deployment, "has_room", has_room)
