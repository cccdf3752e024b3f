"""How people type: articles and plurals, polite additions, slips of the finger, and names."""

from __future__ import annotations

import random

from . import tables as t


def a(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return (
        f"an {noun}"
        if noun[0] in "aeiouAEIOU" and not noun.startswith(("uni", "use"))
        else f"a {noun}"
    )


def sentence(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def plural(noun: str) -> str:
    """Return the plural of a noun of the tables."""
    return t.IRREGULAR_PLURALS.get(noun, noun + "s")


PREFIXES = (
    "Hey, ",
    "Hi, ",
    "Hello, ",
    "Ok, ",
    "So, ",
    "Now, ",
    "Well, ",
    "Please tell me, ",
    "Um, ",
    "And now, ",
)

SUFFIXES = (" please", ", please", " for me", " 🙂", " thanks", " my friend", ", buddy")

TYPOS = {
    "what": ("waht", "wat", "whta"),
    "what's": ("whats",),
    "you": ("u", "yuo"),
    "are": ("r", "aer"),
    "the": ("teh", "th"),
    "story": ("stroy", "sotry", "storie"),
    "colour": ("colur", "coluor"),
    "color": ("colr", "coler"),
    "tell": ("tel", "tlel"),
    "comes": ("coms",),
    "after": ("aftr", "afer"),
    "before": ("befor", "bevore"),
    "opposite": ("oposite", "opposit"),
    "please": ("plz", "pls"),
    "hello": ("helo", "hallo", "helllo"),
    "about": ("abuot", "abot"),
    "name": ("nmae", "naem"),
    "capital": ("captial", "capitol"),
    "thanks": ("thx", "thanx"),
    "which": ("wich",),
    "does": ("dose",),
    "many": ("mnay",),
}


def decapitalise(text: str) -> str:
    """Lower the first letter unless the word is I, I'm or all in capitals."""
    first = text.split(" ")[0]
    if first in ("I", "I'm") or (len(first) > 1 and first.isupper()):
        return text
    return text[:1].lower() + text[1:]


def decorate(rng: random.Random, text: str, chance: float = 0.15) -> tuple[str, str]:
    """Now and then put an idle phrase around the text; return it and a tag of what was added."""
    prefix = rng.choice(PREFIXES) if rng.random() < chance else ""
    suffix = rng.choice(SUFFIXES) if rng.random() < chance * 0.6 else ""
    if prefix:
        text = prefix + decapitalise(text)
    if suffix:
        body, mark = (text[:-1], text[-1]) if text[-1] in ".?!" else (text, "")
        text = body + suffix + mark
    return text, f"{prefix}|{suffix}" if prefix or suffix else ""


def misspell(rng: random.Random, text: str) -> str:
    """Mistype one of the common words."""
    words = text.split(" ")
    spots = [i for i, word in enumerate(words) if word.lower() in TYPOS]
    if spots:
        spot = rng.choice(spots)
        words[spot] = rng.choice(TYPOS[words[spot].lower()])
    return " ".join(words)


def roughen(rng: random.Random, text: str, may_shout: bool = True) -> str:
    """Type the text the way people do: lower case, no full stop, no apostrophe, a slip of the
    finger.

    Shouting (all capitals) is left out where the answer repeats words of the question: their usual
    spelling cannot be read from capitals.
    """
    if rng.random() < 0.06:
        text = misspell(rng, text)
    roll = rng.random()
    if roll < 0.40:
        text = text.lower()
    elif roll < 0.43 and may_shout:
        text = text.upper()
    roll = rng.random()
    if roll < 0.40:
        text = text.rstrip(".?!") or text
    elif roll < 0.45:
        text = text.rstrip(".?!") + rng.choice(("!", "??", "...", " ?", "!!"))
    if rng.random() < 0.25:
        text = text.replace("'", "")
    return text


ONSETS = ("", *t.words("b c ch d f g h j k l m n p qu r s sh t v w x y z br dr gr tr st kr"))
VOWELS = t.words("a e i o u ai ei ia io ee oo")
CODAS = ("", "", "", "n", "r", "s", "l", "m", "t", "k", "x", "nd", "ck")


def invented_word(rng: random.Random) -> str:
    """Return a word of no list, mostly a pronounceable one: to repeat it, one must copy."""
    if rng.random() < 0.08:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 5)))
    syllables = (
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        for _ in range(rng.choice((1, 2, 2, 2, 3)))
    )
    return "".join(syllables)


def spliced_name(rng: random.Random) -> str:
    """Return the beginning of one name with the end of another: new, but of familiar pieces."""
    first, second = rng.choice(t.NAMES), rng.choice(t.NAMES)
    return first[: rng.randint(1, len(first))] + second[rng.randint(1, len(second) - 1) :]


def any_name(rng: random.Random) -> str:
    """Return a first name: common, spliced from two, or invented."""
    roll = rng.random()
    if roll < 0.45:
        return rng.choice(t.NAMES)
    return spliced_name(rng) if roll < 0.8 else invented_word(rng).capitalize()
