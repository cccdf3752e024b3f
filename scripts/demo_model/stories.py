"""Short stories on request, and questions about the story told."""

from __future__ import annotations

import random

from . import tables as t
from .exchange import Exchange, State, from_template
from .wording import a, any_name, decorate, invented_word

STORY_OPENERS = (
    "Tell me a story about {c}.",
    "Tell me a story about {c}.",
    "Tell a story about {c}.",
    "Tell me a short story about {c}.",
    "Can you tell me a story about {c}?",
    "I want a story about {c}.",
    "A story about {c}",
    "Please tell me a story about {c}.",
    "Write a story about {c}.",
    "Do you know a story about {c}?",
    "Story about {c}",
)

PLAIN_STORY = (
    "Tell me a story.",
    "Tell me a story",
    "Can you tell me a story?",
    "Tell a story.",
    "I want a story.",
    "A story",
    "Tell me a short story.",
    "Do you know a story?",
    "Please tell me a story.",
    "Write a story.",
    "Story time!",
    "Can you tell stories?",
    "I would like a story.",
    "Tell me a funny story.",
    "Tell me a long story.",
    "Tell me a scary story.",
    "Tell me a nice story.",
    "Tell me a new story.",
    "Tell me a good story.",
    "Tell me a bedtime story.",
    "Tell me something.",
    "story",
)

MORE_STORY = (
    "Tell me another story.",
    "Another story",
    "One more story.",
    "Tell me one more story.",
    "Do you know another story?",
)

MORE = (
    "Another one",
    "Another one please",
    "One more",
    "Tell me another one.",
    "More",
    "Again",
    "Another",
    "Another story",
)


def tell_story(who: str, name: str, nature: str) -> str:
    """Return the story about a kind of character, with the name and nature asked for."""
    plot = t.PLOTS[who]
    friend = plot.friend.split(" ", 1)[1]
    return (
        f"Once upon a time there was {a(nature)} {who} named {name}. {name} lived {plot.home}. "
        f"One day {name} found {plot.found} and showed it to {plot.friend}. "
        f"{name} and the {friend} {plot.ending}. The end."
    )


def story(
    category: str, user: str, who: str, name: str, nature: str, keys: tuple[str, ...]
) -> Exchange:
    """Put a request and its story together and remember whom it was about."""
    remember = {"topic": "story", "story": (who, name, nature)}
    return Exchange(category, user, tell_story(who, name, nature), keys, remember)


def ask_story(rng: random.Random, state: State) -> Exchange:
    """Ask for a story: any, about a kind of character, with a nature, with a name."""
    roll = rng.random()
    if roll < 0.15:
        user, tag = decorate(rng, rng.choice(PLAIN_STORY), chance=0.3)
        return story("story", user, "cat", "Tom", "small", (f"story:{user}",) if tag else ())
    if roll < 0.2:
        user, tag = decorate(rng, rng.choice(MORE_STORY), chance=0.3)
        return story("story", user, "dog", "Rex", "happy", (f"story:{user}",) if tag else ())
    if roll < 0.25:
        return ask_impossible_story(rng)
    if roll < 0.32:
        name, opener = any_name(rng), rng.choice(STORY_OPENERS)
        return story("story", opener.format(c=name), "cat", name, "small", (f"name:{name}",))
    who = rng.choice(list(t.PLOTS))
    plot, opener = t.PLOTS[who], rng.choice(STORY_OPENERS)
    if roll < 0.36:
        second = rng.choice([other for other in t.PLOTS if other != who])
        user, key = opener.format(c=f"{a(who)} and {a(second)}"), f"story:{who} and {second}"
        return story("story", user, who, plot.name, plot.nature, (key,))
    name, nature, character, key = plot.name, plot.nature, who, f"story:{opener}|{who}"
    if rng.random() < 0.25:
        nature = rng.choice(t.NATURES)
        character, key = f"{nature} {who}", f"story:{nature} {who}"
    phrase = a(character)
    keys: tuple[str, ...] = (key,)
    if rng.random() < 0.6:
        name = any_name(rng)
        phrase = f"{phrase} {rng.choice(('named', 'named', 'called'))} {name}"
        keys = (key, f"name:{name}")
    return story("story", opener.format(c=phrase), who, name, nature, keys)


def follow_story(rng: random.Random, state: State) -> Exchange:
    """Ask for one more story in short, or about the one just told."""
    if rng.random() > 0.1:
        return ask_about_story(rng, state)
    user, tag = decorate(rng, rng.choice(MORE))
    return story("story", user, "dog", "Rex", "happy", (f"more:{user}",) if tag else ())


def ask_impossible_story(rng: random.Random) -> Exchange:
    """Ask for a story about something the model has no story about."""
    what = rng.choice(
        (
            a(invented_word(rng)),
            rng.choice(t.FAR_NOUNS),
            a(rng.choice(("table", "shoe", "car", "house", "tree", "book", "phone", "train"))),
        )
    )
    opener = rng.choice(STORY_OPENERS)
    answer = f"I know no story about {what}. Ask me for one about a cat, a dragon or a robot."
    return from_template("story", opener, what, opener.format(c=what), answer, topic="no story")


STORY_QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What was the {w}'s name?", "The {w}'s name was {n}."),
    ("What is the {w}'s name?", "The {w}'s name was {n}."),
    ("What was the name of the {w}?", "The {w}'s name was {n}."),
    ("What was the {w} called?", "The {w}'s name was {n}."),
    ("Who was the story about?", "The story was about {aw} named {n}."),
    ("What was the story about?", "The story was about {aw} named {n}."),
    ("Who was in the story?", "The story was about {aw} named {n}."),
    ("Who was {n}?", "{n} was {anature} {w}."),
    ("What was {n}?", "{n} was {anature} {w}."),
    ("Who was in it?", "The story was about {aw} named {n}."),
    ("Who was it about?", "The story was about {aw} named {n}."),
    ("What was it about?", "The story was about {aw} named {n}."),
    ("What was his name?", "The {w}'s name was {n}."),
    ("What was her name?", "The {w}'s name was {n}."),
    ("Where did he live?", "{n} lived {home}."),
    ("Where did she live?", "{n} lived {home}."),
    ("And where did {n} live?", "{n} lived {home}."),
    ("What did he find?", "{n} found {found}."),
    ("What did she find?", "{n} found {found}."),
    ("And what did {n} find?", "{n} found {found}."),
    ("Where did {n} live?", "{n} lived {home}."),
    ("Where did the {w} live?", "{n} lived {home}."),
    ("What did {n} find?", "{n} found {found}."),
    ("What did the {w} find?", "{n} found {found}."),
    ("What was found?", "{n} found {found}."),
    ("Who was the friend?", "The friend was {friend}."),
    ("Who was {n}'s friend?", "The friend was {friend}."),
    ("Who did {n} meet?", "The friend was {friend}."),
    ("Who was the friend of the {w}?", "The friend was {friend}."),
    ("How did the story end?", "In the end they {ending}."),
    ("What happened in the end?", "In the end they {ending}."),
    ("How did it end?", "In the end they {ending}."),
    ("What did they do?", "In the end they {ending}."),
)


def ask_about_story(rng: random.Random, state: State) -> Exchange:
    """Ask about the story told last, or about one when none was told."""
    question, answer = rng.choice(STORY_QUESTIONS)
    who, name, nature = state.get("story") or (rng.choice(list(t.PLOTS)), any_name(rng), "")
    plot = t.PLOTS[who]
    words = {
        "w": who,
        "aw": a(who),
        "n": name,
        "anature": a(nature) if nature else "",
        "home": plot.home,
        "found": plot.found,
        "friend": plot.friend,
        "ending": plot.ending,
    }
    user = question.format(**words)
    if "story" not in state:
        if "{n}" in question:
            return ask_about_story(rng, state)
        return Exchange(
            "recall_untold", user, "I have not told you a story yet.", (f"nostory:{user}",)
        )
    keys = (
        (f"storyq:{question}|{who}", f"name:{name}")
        if name != plot.name
        else (f"storyq:{question}|{who}",)
    )
    return Exchange("story_question", user, answer.format(**words), keys, {"topic": "story"})
