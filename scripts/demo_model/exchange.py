"""The parts a conversation is made of, and the rule that holds combinations back.

Every exchange carries *keys*: short strings that say which combination it asks about, such as
`add:7,12` or `name:Anna`. One key in ten, chosen by a hash of its text, is held back: training
conversations never contain it, and each question of the held-back set contains at least one. So the
score on the held-back set says whether the model has learned the rule and not the list.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HELD_BACK_ONE_IN = 10

Message = dict[str, str]

State = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """One question with its answer, and what the conversation knows afterwards."""

    category: str
    user: str
    assistant: str
    keys: tuple[str, ...] = ()
    remember: State = field(default_factory=dict)


Asker = Callable[[random.Random, State], Exchange]


def is_held_back(key: str) -> bool:
    """Tell whether training must never show this combination; it is the same everywhere."""
    return zlib.crc32(key.encode()) % HELD_BACK_ONE_IN == 0


def from_template(
    category: str, template: str, content: str, user: str, answer: str, **remember: Any
) -> Exchange:
    """Build an exchange about a fact; the pair of phrasing and fact is its key."""
    return Exchange(category, user, answer, (f"{category}:{template}|{content}",), remember)
