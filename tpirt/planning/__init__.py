"""Scaffold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Deployment:
    config: Any
    limits: tuple[Any, ...]
    peers: tuple[Any, ...]
    ranks: tuple[Any, ...]
    collectives: Any
    world_size: int
