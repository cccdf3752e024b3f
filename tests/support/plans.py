"""Deployments that have only one plan, as where memory is short."""

from __future__ import annotations

from typing import Any

import pytest

from tpirt.errors import MemoryLimitError
from tpirt.planning import Deployment, lineup, plan


def allow_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no other plan possible after the loss of a peer."""

    def first(*arguments: Any, like: Deployment | None, **options: Any) -> Deployment:
        if like is not None:
            raise MemoryLimitError("too little memory")
        return plan(*arguments, **options)

    monkeypatch.setattr(lineup, "plan", first)
