"""What users tell about themselves, and the later questions about it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from . import tables as t
from .arithmetic import arithmetic
from .exchange import Asker, Exchange, State
from .facts import ask_capital, ask_colour, ask_opposite
from .small_talk import small_talk
from .wording import a, any_name, decapitalise, decorate, invented_word, sentence

TELL_NAME = (
    "My name is {x}.",
    "I am {x}.",
    "I'm {x}.",
    "Call me {x}.",
    "You can call me {x}.",
    "Hi, I'm {x}.",
    "Hi, I am {x}.",
    "Hello, my name is {x}.",
    "Hi! My name is {x}.",
    "My name's {x}.",
    "Hello, I'm {x}.",
    "The name is {x}.",
    "People call me {x}.",
    "Remember, my name is {x}.",
    "I am called {x}.",
    "This is {x}.",
    "Actually, my name is {x}.",
    "No, my name is {x}.",
    "Sorry, my name is {x}.",
)

ASK_NAME = (
    "What is my name?",
    "What's my name?",
    "Do you remember my name?",
    "Do you know my name?",
    "Who am I?",
    "Tell me my name.",
    "My name?",
    "And what is my name?",
    "Can you tell me my name?",
    "What am I called?",
    "Say my name.",
    "What was my name?",
    "What was my name again?",
    "Do you know who I am?",
    "And my name?",
    "And who am I?",
)


def tell_name(rng: random.Random, state: State) -> Exchange:
    """Say one's name."""
    name = any_name(rng)
    user = rng.choice(TELL_NAME).format(x=name)
    return Exchange(
        "name",
        user,
        f"Nice to meet you, {name}!",
        (f"name:{name}",),
        {"name": name, "topic": "name"},
    )


def ask_name(rng: random.Random, state: State) -> Exchange:
    """Ask for the name told before, if one was."""
    name = state.get("name")
    if name is None:
        user, tag = decorate(rng, rng.choice(ASK_NAME))
        keys = (f"noname:{user}",) if tag else ()
        return Exchange("recall_untold", user, "You have not told me your name yet.", keys)
    user, _ = decorate(rng, rng.choice(ASK_NAME), chance=0.05)
    return Exchange("recall", user, f"Your name is {name}.", (f"name:{name}",))


class Personal(NamedTuple):
    """One kind of thing a user tells about themselves and asks for later."""

    kind: str
    tell: Sequence[str]
    reply: str
    ask: Sequence[str]
    answer: str
    untold: str
    values: Sequence[str]


PERSONAL = (
    Personal(
        "age",
        (
            "I am {x} years old.",
            "I'm {x} years old.",
            "I am {x}.",
            "My age is {x}.",
            "I'm {x}.",
            "I just turned {x}.",
        ),
        "{x} is a fine age!",
        (
            "How old am I?",
            "What is my age?",
            "What's my age?",
            "Do you know how old I am?",
            "Do you remember my age?",
            "And my age?",
        ),
        "You are {x} years old.",
        "You have not told me your age yet.",
        [str(n) for n in range(4, 100)],
    ),
    Personal(
        "colour",
        (
            "My favourite colour is {x}.",
            "My favorite color is {x}.",
            "The colour I like best is {x}.",
            "I like the colour {x} best.",
            "I love the color {x}.",
        ),
        "{X} is a beautiful colour!",
        (
            "What is my favourite colour?",
            "What's my favorite color?",
            "Which colour do I like?",
            "Do you remember my favourite colour?",
            "What colour do I like best?",
            "And my favourite colour?",
        ),
        "Your favourite colour is {x}.",
        "You have not told me your favourite colour yet.",
        t.COLOURS,
    ),
    Personal(
        "likes",
        (
            "I like {x}.",
            "I love {x}.",
            "I really like {x}.",
            "I like {x} very much.",
            "I enjoy {x}.",
            "I'm a fan of {x}.",
        ),
        "I see, you like {x}. That is nice!",
        (
            "What do I like?",
            "Do you remember what I like?",
            "What do I love?",
            "Tell me what I like.",
            "What did I say I like?",
            "And what do I like?",
        ),
        "You like {x}.",
        "You have not told me what you like yet.",
        t.FOODS + t.HOBBIES,
    ),
    Personal(
        "city",
        (
            "I live in {x}.",
            "I am from {x}.",
            "I'm from {x}.",
            "I come from {x}.",
            "My home is in {x}.",
            "My city is {x}.",
        ),
        "I have never been to {x}, but it sounds lovely.",
        (
            "Where do I live?",
            "Where am I from?",
            "Where do I come from?",
            "Do you remember where I live?",
            "And where do I live?",
        ),
        "You told me {x}.",
        "You have not told me where you live yet.",
        t.CITIES,
    ),
)


def tell_personal(rng: random.Random, state: State) -> Exchange:
    """Tell an age, a favourite colour, a liking or a home."""
    fact = rng.choice(PERSONAL)
    value = rng.choice(fact.values)
    if fact.kind == "city" and rng.random() < 0.3:
        value = invented_word(rng).capitalize()
    template = rng.choice(fact.tell)
    reply = fact.reply.format(x=value, X=sentence(value))
    keys = (f"{fact.kind}:{template}|{value}",)
    return Exchange(
        "personal", template.format(x=value), reply, keys, {fact.kind: value, "topic": "personal"}
    )


def ask_personal(rng: random.Random, state: State) -> Exchange:
    """Ask for something the user told about themselves, or did not."""
    told = [p for p in PERSONAL if p.kind in state]
    if not told or rng.random() < 0.1:
        fact = rng.choice([p for p in PERSONAL if p.kind not in state] or list(PERSONAL))
    else:
        fact = rng.choice(told)
    question = rng.choice(fact.ask)
    user, tag = decorate(rng, question, chance=0.1)
    if fact.kind not in state:
        return Exchange(
            "recall_untold", user, fact.untold, (f"untold:{question}|{tag}",) if tag else ()
        )
    value = state[fact.kind]
    return Exchange("recall", user, fact.answer.format(x=value), (f"recall:{question}|{value}",))


TELL_PET = (
    "I have a {pet} named {x}.",
    "I have a {pet} called {x}.",
    "My {pet} is called {x}.",
    "My {pet}'s name is {x}.",
    "The name of my {pet} is {x}.",
    "I've got a {pet} named {x}.",
)

ASK_PET = (
    "What is my {pet}'s name?",
    "What's my {pet}'s name?",
    "What is the name of my {pet}?",
    "What is my {pet} called?",
    "How is my {pet} called?",
    "Do you remember my {pet}'s name?",
    "Who is my {pet}?",
    "And my {pet}?",
    "And my {pet}'s name?",
    "Do I have a {pet}?",
)


def tell_two_pets(rng: random.Random, state: State) -> Exchange:
    """Tell the names of two pets in one sentence."""
    (first, second), name, other = rng.sample(t.PETS, 2), any_name(rng), any_name(rng)
    verb = rng.choice(("named", "called"))
    user = f"I have {a(first)} {verb} {name} and {a(second)} {verb} {other}."
    if rng.random() < 0.3:
        user = f"My {first} is called {name} and my {second} is called {other}."
    pets = {**state.get("pets", {}), first: name, second: other}
    keys = (f"name:{name}", f"name:{other}")
    return Exchange(
        "personal",
        user,
        f"{name} and {other} are nice names!",
        keys,
        {"pets": pets, "topic": "pet"},
    )


def tell_pet(rng: random.Random, state: State) -> Exchange:
    """Tell the name of a pet, or of two."""
    if rng.random() < 0.2:
        return tell_two_pets(rng, state)
    pet, name = rng.choice(t.PETS), any_name(rng)
    user = rng.choice(TELL_PET).format(pet=pet, x=name)
    pets = {**state.get("pets", {}), pet: name}
    return Exchange(
        "personal",
        user,
        f"{name} is a nice name for a {pet}!",
        (f"name:{name}",),
        {"pets": pets, "topic": "pet"},
    )


def ask_pet(rng: random.Random, state: State) -> Exchange:
    """Ask for the name of a pet told before, or of one never mentioned.

    Both answers begin with the pet: the model looks it up while it writes, not before.
    """
    pets: dict[str, str] = state.get("pets", {})
    unknown = [pet for pet in t.PETS if pet not in pets]
    if not pets or (unknown and rng.random() < 0.33):
        pet = rng.choice(unknown)
        user = rng.choice(ASK_PET).format(pet=pet)
        answer = f"Your {pet}? You have not told me about it yet."
        return Exchange("recall_untold", user, answer, (f"untold:{user}",))
    pet = rng.choice(sorted(pets))
    user = rng.choice(ASK_PET).format(pet=pet)
    return Exchange("recall", user, f"Your {pet} is called {pets[pet]}.", (f"name:{pets[pet]}",))


def introduce(rng: random.Random, state: State) -> Exchange:
    """Say one's name and something more in one message."""
    name = any_name(rng)
    opening = rng.choice(TELL_NAME[:12]).format(x=name)
    then = add_personal(rng) if rng.random() < 0.5 else add_question(rng)
    more = then.user
    if more.startswith("and "):
        opening = opening.rstrip(".")
    elif opening.endswith(".") and rng.random() < 0.2:
        opening, more = opening[:-1], decapitalise(more)
    return Exchange(
        "introduction",
        f"{opening} {more}",
        f"Nice to meet you, {name}! {then.assistant}",
        (f"name:{name}", *then.keys),
        {"topic": "name", **then.remember, "name": name},
    )


def add_personal(rng: random.Random) -> Exchange:
    """Go on from one's name with another fact, sometimes in the same sentence."""
    fact = rng.choice(PERSONAL)
    value, form = rng.choice(fact.values), rng.choice([form for form in fact.tell if "." in form])
    user, reply = form.format(x=value), fact.reply.format(x=value, X=sentence(value))
    if rng.random() < 0.5 and user.startswith(("I ", "I'm", "My")):
        user = "and " + (user if user.startswith("I") else decapitalise(user))
    return Exchange("", user, reply, (f"{fact.kind}:{form}|{value}",), {fact.kind: value})


def add_question(rng: random.Random) -> Exchange:
    """Go on from one's name with a question."""
    questions: tuple[Asker, ...] = (
        small_talk("about"),
        arithmetic("+"),
        arithmetic("-"),
        ask_colour,
        ask_capital,
        ask_opposite,
    )
    return rng.choice(questions)(rng, {})


def ask_recall(rng: random.Random, state: State) -> Exchange:
    """Ask for something from the earlier turns, mostly for something that was told."""
    choices: list[Asker] = [ask_name, ask_personal, ask_pet]
    known: list[Asker] = []
    if "name" in state:
        known += [ask_name, ask_name]
    if "pets" in state:
        known += [ask_pet, ask_pet]
    if any(fact.kind in state for fact in PERSONAL):
        known.append(ask_personal)
    if known and rng.random() < 0.85:
        choices = known
    return rng.choice(choices)(rng, state)
