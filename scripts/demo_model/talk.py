"""The parts a conversation is made of, the way people type, and the rule for held-out questions.

Every exchange carries *keys*: short strings that say which combination it asks about, such as
`add:7,12` or `name:Anna`. One key in ten, chosen by a hash of its text, is held out: training
conversations never contain it, and each question of the held-out set contains at least one. So the
score on the held-out set says whether the model has learned the rule and not the list.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .data import Data

HELD_OUT_ONE_IN = 10

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


def is_held_out(key: str) -> bool:
    """Tell whether training must never show this combination; it is the same everywhere."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


@dataclass
class Talk:
    """A conversation under way: the data, the source of all choices, what has been said."""

    data: Data
    rng: random.Random
    state: State = field(default_factory=dict)

    def chance(self, probability: float) -> bool:
        """Return true as often as asked for."""
        return self.rng.random() < probability

    def pick(self, *keys: str) -> str:
        """Draw a phrase from one or several lists."""
        return self.rng.choice(self.data.join(*keys))

    def pick_pair(self, key: str) -> tuple[str, str]:
        """Draw a row of a table with one phrase a row."""
        name = self.rng.choice(self.data.names(key))
        return name, self.data.text(f"{key}.{name}")

    def fill(self, template: str, **words: object) -> str:
        """Replace the placeholders of a phrase."""
        return self.data.fill(template, **words)

    def say(self, key: str, **words: object) -> str:
        """Return a text of the data with its placeholders replaced."""
        return self.fill(self.data.text(key), **words)

    def opposites(self) -> dict[str, str]:
        """Return the opposite of each word; every pair counts in both directions."""
        words = self.data.names("opposite.pairs")
        pairs = [(word, self.data.text(f"opposite.pairs.{word}")) for word in words]
        return {x: y for pair in pairs for x, y in (pair, pair[::-1])}

    def plural(self, noun: str) -> str:
        """Return the plural of a noun."""
        regular = noun not in self.data.names("plurals")
        return f"{noun}s" if regular else self.data.text(f"plurals.{noun}")

    def fact(
        self,
        category: str,
        form: str,
        content: str,
        answer: str,
        more: State | None = None,
        **words: object,
    ) -> Exchange:
        """Build an exchange about a fact; the pair of phrasing and fact is its key."""
        user, key = self.fill(form, **words), f"{category}:{form}|{content}"
        return Exchange(category, user, answer, (key,), {"topic": category, **(more or {})})

    def follow(
        self, topic: str, form: str, content: str, answer: str, about: str = "", **words: object
    ) -> Exchange:
        """Build an exchange that goes on with a topic."""
        content = f"{about or topic} {content}"
        return self.fact("follow_up_fact", form, content, answer, {"topic": topic}, **words)

    def decorate(self, text: str, chance: float = 0.15) -> tuple[str, str]:
        """Sometimes put idle phrases around the text; return it and a tag of what was added."""
        before = f"{self.pick('around.before')} " if self.chance(chance) else ""
        after = self.pick("around.after") if self.chance(chance * 0.6) else ""
        if before:
            text = before + decapitalise(text)
        if after:
            after = after if after.startswith(",") else f" {after}"
            body, mark = (text[:-1], text[-1]) if text[-1] in ".?!" else (text, "")
            text = body + after + mark
        return text, f"{before}|{after}" if before or after else ""

    def fixed(
        self, category: str, phrase: str, answer: str, topic: str = "", chance: float = 0.15
    ) -> Exchange:
        """Build an exchange with a fixed answer. Only a decorated phrase is ever held out."""
        user, tag = self.decorate(phrase, chance)
        keys = (f"{category}:{phrase}|{tag}",) if tag else ()
        return Exchange(category, user, answer, keys, {"topic": topic})

    def misspell(self, text: str) -> str:
        """Mistype one of the common words."""
        words, typos = text.split(" "), self.data.names("typos")
        if spots := [i for i, word in enumerate(words) if word.lower() in typos]:
            spot = self.rng.choice(spots)
            words[spot] = self.pick(f"typos.{words[spot].lower()}")
        return " ".join(words)

    def roughen(self, text: str, may_shout: bool) -> str:
        """Type the text the way people do: lower case, no full stop, no apostrophe, typing errors.

        `may_shout` allows capitals only. It is false where the answer repeats words of the
        question: their usual spelling cannot be read from capitals.
        """
        if self.chance(0.06):
            text = self.misspell(text)
        roll = self.rng.random()
        if roll < 0.40:
            text = text.lower()
        elif roll < 0.43 and may_shout:
            text = text.upper()
        roll = self.rng.random()
        if roll < 0.40:
            text = text.rstrip(".?!") or text
        elif roll < 0.45:
            text = text.rstrip(".?!") + self.rng.choice(("!", "??", "...", " ?", "!!"))
        return text.replace("'", "") if self.chance(0.25) else text

    def invented_word(self) -> str:
        """Return a word of no list, mostly a pronounceable one: to repeat it, one must copy."""
        if self.chance(0.08):
            letters = "abcdefghijklmnopqrstuvwxyz"
            return "".join(self.rng.choices(letters, k=self.rng.randint(2, 5)))
        count = self.rng.choice((1, 2, 2, 2, 3))
        parts = ("invented.onsets", "invented.vowels", "invented.codas")
        return "".join(self.pick(part) for _ in range(count) for part in parts)

    def any_name(self) -> str:
        """Return a first name: common, spliced from two, or invented."""
        roll = self.rng.random()
        if roll < 0.45:
            return self.pick("names")
        if roll >= 0.8:
            return self.invented_word().capitalize()
        first, second = self.pick("names"), self.pick("names")
        start = first[: self.rng.randint(1, len(first))]
        return start + second[self.rng.randint(1, len(second) - 1) :]


Asker = Callable[[Talk], Exchange]


def a(noun: str) -> str:
    """Return the noun with its indefinite article."""
    vowel = noun[0] in "aeiouAEIOU" and not noun.startswith(("uni", "use"))
    return f"an {noun}" if vowel else f"a {noun}"


def sentence(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def decapitalise(text: str) -> str:
    """Lower the first letter unless the word is I, I'm or all in capitals."""
    first = text.split(" ")[0]
    if first in ("I", "I'm") or (len(first) > 1 and first.isupper()):
        return text
    return text[:1].lower() + text[1:]
