"""Conversations about a small world, generated from a seed.

Answers are a function of the conversation so far (never random), so that a greedy answer can be
compared exactly. `talk.py` says what is held out from training and why.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import arithmetic, facts, order, personal, small_talk, stories
from .data import Data
from .talk import Asker, Exchange, Message, Talk, is_held_out

# `ask_x` and `tell_x` can open a conversation, with the weights of `[openers]` in wording.toml.
# `follow_x` can follow an exchange that has left the topic x.
ASKERS: dict[str, Asker] = {
    name: asker
    for module in (arithmetic, facts, order, personal, small_talk, stories)
    for name, asker in vars(module).items()
    if name.startswith(("ask_", "tell_", "follow_"))
}

# Answers in these categories repeat words of the question.
REPEATING = {
    "name", "introduction", "personal", "recall", "recall_untold", "echo", "story", "story_question"
}  # fmt: skip

CATEGORIES = {
    "greeting", "about", "joke", "out_of_domain", "name", "introduction", "personal", "naming",
    "recall", "recall_untold", "addition", "subtraction", "multiplication", "follow_up_arithmetic",
    "too_big", "colour", "calendar", "counting", "opposite", "animal", "size", "capital",
    "translation", "follow_up_fact", "echo", "story", "story_question",
}  # fmt: skip


def propose(talk: Talk) -> Exchange:
    """Draw the next exchange: a follow-up, a question about the earlier turns, or a new topic."""
    state = talk.state
    follow_up = ASKERS.get(f"follow_{state.get('topic')}")
    roll = talk.rng.random()
    if follow_up and roll < 0.4:
        return follow_up(talk)
    if roll < 0.7 and any(k in state for k in ("name", "pets", *talk.data.names("personal"))):
        return personal.ask_recall(talk)
    if roll > 0.9 and len(state.get("pets", {})) == 1:
        return personal.tell_pet(talk)
    if roll > 0.95 and "story" in state:
        return stories.ask_story_detail(talk)
    askers, weights = openers(talk.data)
    return talk.rng.choices(askers, weights)[0](talk)


@functools.cache
def openers(data: Data) -> tuple[list[Asker], list[float]]:
    """Return what can open a conversation, with weights."""
    names = data.names("openers")
    for name in names:
        if name not in ASKERS:
            data.fail(f"openers.{name}", f"unknown; known are {', '.join(sorted(ASKERS))}")
    return [ASKERS[name] for name in names], [data.number(f"openers.{name}") for name in names]


def draw_trained(talk: Talk) -> Exchange:
    """Draw an exchange that contains nothing held out."""
    while True:
        exchange = propose(talk)
        if not any(map(is_held_out, exchange.keys)):
            return exchange


def extend(messages: list[Message], talk: Talk, exchange: Exchange) -> None:
    """Append the exchange, its question roughened, and remember what it leaves behind."""
    question = talk.roughen(exchange.user, may_shout=exchange.category not in REPEATING)
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": exchange.assistant})
    talk.state.update(exchange.remember)


def begin(talk: Talk) -> list[Message]:
    """Start a conversation, with a system message in a quarter of the cases."""
    return [{"role": "system", "content": talk.pick("system")}] if talk.chance(0.25) else []


def characters(messages: list[Message]) -> int:
    """Return the length of a conversation."""
    return sum(len(message["content"]) for message in messages)


def training_conversation(data: Data, rng: random.Random, min_chars: int = 0) -> list[Message]:
    """Return one conversation of one to six exchanges without anything held out.

    With `min_chars` it goes on until it has this many characters.
    """
    talk = Talk(data, rng)
    messages = begin(talk)
    turns = rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
    while turns > 0 or characters(messages) < min_chars:
        extend(messages, talk, draw_trained(talk))
        turns -= 1
    return messages


@dataclass(frozen=True)
class HeldOut:
    """A conversation whose last question was held out, with the one right answer."""

    category: str
    messages: list[Message]
    answer: str


def held_out_questions(data: Data, rng: random.Random, min_chars: int = 0) -> Iterator[HeldOut]:
    """Yield questions that contain a held-out combination, after some other turns.

    A held-out name must come into the conversation to be asked for later, so the turns before are
    drawn from both sets; each of them that is held out is yielded as a question of its own as well.
    """
    while True:
        talk = Talk(data, rng)
        messages = begin(talk)
        for _ in range(rng.randint(1, 6) if not min_chars else 200):
            exchange = propose(talk)
            long_enough = characters(messages) >= min_chars
            extend(messages, talk, exchange)
            if long_enough and any(map(is_held_out, exchange.keys)):
                yield HeldOut(exchange.category, messages[:-1], exchange.assistant)
            if min_chars and characters(messages) >= min_chars + 300:
                break


def held_out_set(data: Data, seed: int, per_category: int, long: int) -> list[HeldOut]:
    """Return the questions to score, `per_category` of each and `long` in long conversations."""
    rng = random.Random(f"held back {seed}")  # this text decides the questions of a seed
    chosen: dict[str, list[HeldOut]] = {}
    for question in held_out_questions(data, rng):
        of_category = chosen.setdefault(question.category, [])
        if len(of_category) < per_category:
            of_category.append(question)
        elif len(chosen) == len(CATEGORIES) and min(map(len, chosen.values())) >= per_category:
            break
    far_back = (
        HeldOut("long_conversation", question.messages, question.answer)
        for question in held_out_questions(data, rng, min_chars=1600)
        if question.category in ("recall", "story_question")
    )
    return [q for found in chosen.values() for q in found] + list(itertools.islice(far_back, long))
