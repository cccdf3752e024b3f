"""Conversations about a small world, generated from a seed.

Answers are a function of the conversation so far (never random), so that a greedy answer can be
compared exactly. `exchange.py` says what is held back from training and why.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import tables as t
from .arithmetic import arithmetic, ask_three_terms, ask_too_big, ask_twice, follow_arithmetic
from .exchange import Asker, Exchange, Message, State, is_held_back
from .facts import (
    ask_animal,
    ask_capital,
    ask_colour,
    ask_echo,
    ask_opposite,
    ask_to_name,
    ask_translation,
    follow_animal,
    follow_capital,
    follow_colour,
    follow_opposite,
    follow_translation,
)
from .order import ask_calendar, ask_counting, ask_size, follow_calendar
from .personal import (
    ask_name,
    ask_personal,
    ask_pet,
    ask_recall,
    introduce,
    tell_name,
    tell_personal,
    tell_pet,
)
from .small_talk import (
    ask_liking,
    ask_unknown,
    follow_how_are_you,
    follow_joke,
    follow_offer,
    small_talk,
)
from .stories import ask_about_story, ask_story, follow_story
from .wording import roughen

OPENERS: tuple[tuple[float, Asker], ...] = (
    (10, small_talk("greeting")),
    (8, small_talk("about")),
    (1.5, small_talk("joke")),
    (6, ask_unknown),
    (7, tell_name),
    (3, introduce),
    (6, tell_personal),
    (5, tell_pet),
    (9, arithmetic("+")),
    (14, arithmetic("-")),
    (9, arithmetic("×")),
    (2, ask_three_terms),
    (1, ask_twice),
    (4.5, ask_too_big),
    (9, ask_colour),
    (1, ask_liking),
    (2, ask_to_name),
    (8, ask_calendar),
    (7, ask_counting),
    (6, ask_opposite),
    (8, ask_animal),
    (6, ask_size),
    (5, ask_capital),
    (4, ask_translation),
    (3, ask_echo),
    (9, ask_story),
    (0.8, ask_name),
    (0.8, ask_personal),
    (0.4, ask_pet),
    (0.4, ask_about_story),
)

FOLLOW_UPS: dict[str, Asker] = {
    "arithmetic": follow_arithmetic,
    "colour": follow_colour,
    "calendar": follow_calendar,
    "opposite": follow_opposite,
    "animal": follow_animal,
    "capital": follow_capital,
    "translation": follow_translation,
    "story": follow_story,
    "pet": ask_pet,
    "joke": follow_joke,
    "how are you": follow_how_are_you,
    "offer": follow_offer,
}

REPEATING = (
    "name",
    "introduction",
    "personal",
    "recall",
    "recall_untold",
    "echo",
    "story",
    "story_question",
)

RECALLABLE = ("name", "pets", "age", "colour", "likes", "city")


def propose(rng: random.Random, state: State) -> Exchange:
    """Draw the next exchange: a follow-up, a question about the earlier turns, or a new topic."""
    follow_up = FOLLOW_UPS.get(state.get("topic", ""))
    roll = rng.random()
    if follow_up and roll < 0.4:
        return follow_up(rng, state)
    if roll < 0.7 and any(kind in state for kind in RECALLABLE):
        return ask_recall(rng, state)
    if roll > 0.9 and len(state.get("pets", {})) == 1:
        return tell_pet(rng, state)
    if roll > 0.95 and "story" in state:
        return ask_about_story(rng, state)
    asker = rng.choices([asker for _, asker in OPENERS], [weight for weight, _ in OPENERS])[0]
    return asker(rng, state)


def draw_trained(rng: random.Random, state: State) -> Exchange:
    """Draw an exchange that contains nothing held back."""
    while True:
        exchange = propose(rng, state)
        if not any(map(is_held_back, exchange.keys)):
            return exchange


def extend(messages: list[Message], state: State, exchange: Exchange, rng: random.Random) -> None:
    """Append the exchange, its question roughened, and remember what it leaves behind."""
    may_shout = exchange.category not in REPEATING
    messages.append({"role": "user", "content": roughen(rng, exchange.user, may_shout)})
    messages.append({"role": "assistant", "content": exchange.assistant})
    state.update(exchange.remember)


def begin(rng: random.Random) -> list[Message]:
    """Start a conversation, with a system message in a quarter of the cases."""
    return (
        [{"role": "system", "content": rng.choice(t.SYSTEM_MESSAGES)}]
        if rng.random() < 0.25
        else []
    )


def training_conversation(rng: random.Random, min_chars: int = 0) -> list[Message]:
    """Return one conversation without anything held back.

    Args:
        rng: The source of all choices.
        min_chars: Go on until the conversation has this many characters; the usual length is
            one to six exchanges.
    """
    messages, state = begin(rng), State()
    turns = rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
    while turns > 0 or sum(len(m["content"]) for m in messages) < min_chars:
        extend(messages, state, draw_trained(rng, state), rng)
        turns -= 1
    return messages


@dataclass(frozen=True)
class HeldBack:
    """A conversation whose last question was held back, with the one right answer."""

    category: str
    messages: list[Message]
    answer: str


def held_back_questions(rng: random.Random, min_chars: int = 0) -> Iterator[HeldBack]:
    """Yield questions that contain a held-back combination, after some trained turns.

    A held-back name must come into the conversation to be asked for later, so the turns before are
    drawn from both sets; every one of them that is held back is yielded as a question of its own as
    well.
    """
    while True:
        messages, state = begin(rng), State()
        for _ in range(rng.randint(1, 6) if not min_chars else 200):
            exchange = propose(rng, state)
            long_enough = sum(len(m["content"]) for m in messages) >= min_chars
            extend(messages, state, exchange, rng)
            if long_enough and any(map(is_held_back, exchange.keys)):
                yield HeldBack(exchange.category, messages[:-1], exchange.assistant)
            if min_chars and sum(len(m["content"]) for m in messages) >= min_chars + 300:
                break


def held_back_set(seed: int, per_category: int, long_conversations: int) -> list[HeldBack]:
    """Return the questions to score: as many for every category, and some in long conversations."""
    rng = random.Random(f"held back {seed}")
    chosen: dict[str, list[HeldBack]] = {}
    for question in held_back_questions(rng):
        of_category = chosen.setdefault(question.category, [])
        if len(of_category) < per_category:
            of_category.append(question)
        elif len(chosen) == len(CATEGORIES) and all(
            len(found) >= per_category for found in chosen.values()
        ):
            break
    recalls = (
        q
        for q in held_back_questions(rng, min_chars=1600)
        if q.category in ("recall", "story_question")
    )
    long = [
        HeldBack("long_conversation", question.messages, question.answer)
        for question in itertools.islice(recalls, long_conversations)
    ]
    return [question for found in chosen.values() for question in found] + long


CATEGORIES = (
    "greeting",
    "about",
    "joke",
    "out_of_domain",
    "name",
    "introduction",
    "personal",
    "naming",
    "recall",
    "recall_untold",
    "addition",
    "subtraction",
    "multiplication",
    "follow_up_arithmetic",
    "too_big",
    "colour",
    "calendar",
    "counting",
    "opposite",
    "animal",
    "size",
    "capital",
    "translation",
    "follow_up_fact",
    "echo",
    "story",
    "story_question",
)
