"""Facts from the tables: colours, opposites, animals, capitals, words of other languages."""

from __future__ import annotations

import random

from . import tables as t
from .exchange import Exchange, State, from_template
from .wording import a, invented_word, plural, sentence

COLOUR_FORMS = (
    "What colour is {x}?",
    "What color is {x}?",
    "What's the colour of {x}?",
    "What is the color of {x}?",
    "Which colour does {x} have?",
    "Tell me the colour of {x}.",
    "Do you know what colour {x} is?",
    "{x} colour?",
    "{x} has which color?",
    "Color of {x}?",
)

COLOUR_PLURAL_FORMS = (
    "What colour are {x}?",
    "What color are {x}?",
    "What is the colour of {x}?",
    "Tell me what colour {x} are.",
)

COLOUR_NEXT = (
    "And {x}?",
    "And {x}?",
    "What about {x}?",
    "And what about {x}?",
    "How about {x}?",
    "And the colour of {x}?",
    "{x}?",
    "{x}",
)


def coloured_thing(rng: random.Random) -> tuple[str, str, str]:
    """Return a thing as asked for, its colour and the answer."""
    if rng.random() < 0.4:
        thing = rng.choice(list(t.COLOUR_OF))
        colour = t.COLOUR_OF[thing]
        return thing, colour, f"{sentence(thing)} is {colour}."
    noun = rng.choice(list(t.COLOUR_OF_A))
    colour = t.COLOUR_OF_A[noun]
    if rng.random() < 0.35:
        return plural(noun), colour, f"{sentence(plural(noun))} are {colour}."
    return a(noun), colour, f"{sentence(a(noun))} is {colour}."


def ask_colour(rng: random.Random, state: State) -> Exchange:
    """Ask for the colour of a thing, whether a thing has a colour, or for a thing of a colour."""
    roll = rng.random()
    if roll < 0.08:
        colour = rng.choice(t.COLOURS)
        form = rng.choice(
            (
                "Name something {x}.",
                "What is {x}?",
                "Tell me something {x}.",
                "Name a {x} thing.",
                "Which thing is {x}?",
            )
        )
        answer = f"{sentence(t.SOMETHING_OF_COLOUR[colour])} is {colour}."
        return from_template("colour", form, colour, form.format(x=colour), answer, topic="colour")
    thing, colour, answer = coloured_thing(rng)
    is_plural = " are " in answer
    if roll < 0.33:
        asked = rng.choice((colour, rng.choice(t.COLOURS)))
        form = "Are {x} {c}?" if is_plural else "Is {x} {c}?"
        answer = f"{answer[:-1]}, so {'yes' if asked == colour else 'no'}."
        return from_template(
            "colour",
            form,
            f"{thing},{asked}",
            form.format(x=thing, c=asked),
            answer,
            topic="colour",
        )
    if roll < 0.41 and not is_plural:
        return ask_unknown_colour(rng)
    form = rng.choice(COLOUR_PLURAL_FORMS if is_plural else COLOUR_FORMS)
    spoken = (
        thing.split(" ", 1)[1]
        if rng.random() < 0.1 and thing.startswith(("a ", "an ", "the "))
        else thing
    )
    return from_template(
        "colour", form, thing, sentence(form.format(x=spoken)), answer, topic="colour"
    )


def ask_unknown_colour(rng: random.Random) -> Exchange:
    """Ask for the colour of a thing that does not exist, or of one's own thing."""
    if rng.random() < 0.5:
        whose, thing = rng.choice(("my", "my", "the")), rng.choice(t.MY_THINGS)
        form = rng.choice(COLOUR_FORMS[:6])
        answer = f"I do not know the colour of {whose.replace('my', 'your')} {thing}."
        thing = f"{whose} {thing}"
        user = form.format(x=thing)
        return from_template("colour", form, thing, user, answer, topic="colour")
    word = invented_word(rng)
    thing = rng.choice((a(word), a(word), f"the {word}"))
    form = rng.choice(COLOUR_FORMS)
    return from_template(
        "colour",
        form,
        thing,
        sentence(form.format(x=thing)),
        f"I do not know the colour of {thing}.",
        topic="colour",
    )


def follow_colour(rng: random.Random, state: State) -> Exchange:
    """Ask for the next thing's colour without naming the subject again."""
    thing, _, answer = coloured_thing(rng)
    form = rng.choice(COLOUR_NEXT)
    return from_template(
        "follow_up_fact",
        form,
        f"colour {thing}",
        sentence(form.format(x=thing)),
        answer,
        topic="colour",
    )


OPPOSITE_FORMS = (
    "What is the opposite of {x}?",
    "What's the opposite of {x}?",
    "Tell me the opposite of {x}.",
    "Opposite of {x}?",
    "Opposite of {x}",
    "The opposite of {x} is?",
    "Do you know the opposite of {x}?",
    "Which word is the opposite of {x}?",
    "Give me the opposite of {x}.",
)


def ask_opposite(rng: random.Random, state: State) -> Exchange:
    """Ask for the opposite of a word."""
    word, form = rng.choice(list(t.OPPOSITE_OF)), rng.choice(OPPOSITE_FORMS)
    if rng.random() < 0.12:
        word = invented_word(rng)
        answer = f"I do not know the opposite of {word}."
        return from_template("opposite", form, word, form.format(x=word), answer, topic="opposite")
    answer = f"The opposite of {word} is {t.OPPOSITE_OF[word]}."
    return from_template("opposite", form, word, form.format(x=word), answer, topic="opposite")


def follow_opposite(rng: random.Random, state: State) -> Exchange:
    """Ask for the next opposite without saying so."""
    word, form = (
        rng.choice(list(t.OPPOSITE_OF)),
        rng.choice(
            (
                "And {x}?",
                "And of {x}?",
                "What about {x}?",
                "And the opposite of {x}?",
                "{x}",
                "{x}?",
            )
        ),
    )
    answer = f"The opposite of {word} is {t.OPPOSITE_OF[word]}."
    return from_template(
        "follow_up_fact", form, f"opposite {word}", form.format(x=word), answer, topic="opposite"
    )


ANIMAL_FORMS: dict[str, tuple[str, ...]] = {
    "sound": (
        "What sound does {a} make?",
        "What does {a} say?",
        "What does the {n} say?",
        "How does {a} sound?",
        "What sound does the {n} make?",
        "What noise does {a} make?",
        "What sound do {ns} make?",
        "What do {ns} say?",
    ),
    "legs": (
        "How many legs does {a} have?",
        "How many legs has {a}?",
        "How many legs does the {n} have?",
        "How many feet does {a} have?",
        "How many legs do {ns} have?",
    ),
    "home": (
        "Where does {a} live?",
        "Where do {ns} live?",
        "Where can I find {a}?",
        "Where does the {n} live?",
    ),
    "baby": (
        "What is a baby {n} called?",
        "What do you call a baby {n}?",
        "What is the baby of {a}?",
        "How is a young {n} called?",
    ),
    "food": (
        "What does {a} eat?",
        "What do {ns} eat?",
        "What does the {n} eat?",
        "What is the food of {a}?",
        "What does {a} like to eat?",
    ),
    "kind": (
        "What is {a}?",
        "Tell me about {ns}.",
        "What do you know about {ns}?",
        "Tell me something about {ns}.",
    ),
}

ANIMAL_ANSWERS = {
    "sound": "{A} says {x}.",
    "legs": "{A} has {x} legs.",
    "home": "{A} lives {x}.",
    "baby": "A baby {n} is called {ax}.",
    "food": "{A} eats {x}.",
}


def animals(name: str) -> str:
    """Return the plural of an animal."""
    return t.IRREGULAR_ANIMALS.get(name, name + "s")


def ask_unknown_animal(rng: random.Random) -> Exchange:
    """Ask for something about an animal that does not exist."""
    name = invented_word(rng)
    form = rng.choice(
        [
            form
            for kind in ("sound", "legs", "home", "food")
            for form in ANIMAL_FORMS[kind]
            if "{ns}" not in form
        ]
    )
    return from_template(
        "animal",
        form,
        name,
        form.format(a=a(name), n=name),
        f"I do not know what {a(name)} is.",
        topic="far",
    )


def animal_answer(animal: t.Animal, kind: str) -> str:
    """Return the sentence with one fact about an animal."""
    if kind == "kind":
        subject = sentence(a(animal.name))
        return f"{subject} is an animal. It has {animal.legs} legs and lives {animal.home}."
    if kind == "sound" and not animal.sound:
        return f"{sentence(a(animal.name))} is very quiet."
    value = str(getattr(animal, kind))
    return ANIMAL_ANSWERS[kind].format(
        A=sentence(a(animal.name)), n=animal.name, x=value, ax=a(value)
    )


def ask_animal(rng: random.Random, state: State) -> Exchange:
    """Ask for a fact about an animal, or which animal makes a sound."""
    roll = rng.random()
    if roll < 0.06:
        return ask_unknown_animal(rng)
    animal = rng.choice(t.ANIMALS)
    if roll < 0.14 and animal.sound:
        form = rng.choice(
            (
                "Which animal says {x}?",
                "What animal says {x}?",
                "Who says {x}?",
                "What animal makes {x}?",
            )
        )
        answer = f"{sentence(a(animal.name))} says {animal.sound}."
        return from_template(
            "animal",
            form,
            animal.name,
            form.format(x=animal.sound),
            answer,
            topic="animal",
            fact="sound",
        )
    kind = rng.choice(("sound", "sound", "legs", "home", "baby", "food", "kind"))
    form = rng.choice(ANIMAL_FORMS[kind])
    user = form.format(a=a(animal.name), n=animal.name, ns=animals(animal.name))
    return from_template(
        "animal", form, animal.name, user, animal_answer(animal, kind), topic="animal", fact=kind
    )


def follow_animal(rng: random.Random, state: State) -> Exchange:
    """Ask the same of another animal."""
    animal = rng.choice(t.ANIMALS)
    form = rng.choice(("And {a}?", "And {a}?", "What about {a}?", "And the {n}?", "How about {a}?"))
    user, kind = form.format(a=a(animal.name), n=animal.name), state["fact"]
    return from_template(
        "follow_up_fact",
        form,
        f"{kind} {animal.name}",
        user,
        animal_answer(animal, kind),
        topic="animal",
        fact=kind,
    )


CAPITAL_FORMS = (
    "What is the capital of {x}?",
    "What's the capital of {x}?",
    "Which city is the capital of {x}?",
    "Tell me the capital of {x}.",
    "Capital of {x}?",
    "Do you know the capital of {x}?",
    "Name the capital of {x}.",
)


def ask_capital(rng: random.Random, state: State) -> Exchange:
    """Ask for a capital; of a country that does not exist now and then."""
    form = rng.choice(CAPITAL_FORMS)
    if rng.random() < 0.1:
        country = invented_word(rng).capitalize()
        answer = f"I do not know the capital of {country}."
    else:
        country = rng.choice(list(t.CAPITALS))
        answer = f"The capital of {country} is {t.CAPITALS[country]}."
    return from_template("capital", form, country, form.format(x=country), answer, topic="capital")


def follow_capital(rng: random.Random, state: State) -> Exchange:
    """Ask for the capital of another country."""
    country = rng.choice(list(t.CAPITALS))
    form = rng.choice(
        ("And {x}?", "And of {x}?", "What about {x}?", "And the capital of {x}?", "{x}?", "{x}")
    )
    answer = f"The capital of {country} is {t.CAPITALS[country]}."
    return from_template(
        "follow_up_fact",
        form,
        f"capital {country}",
        form.format(x=country),
        answer,
        topic="capital",
    )


TRANSLATION_FORMS = (
    "How do you say {w} in {l}?",
    "What is {w} in {l}?",
    "Translate {w} to {l}.",
    "Translate {w} into {l}.",
    "Say {w} in {l}.",
    "{W} in {l}?",
    "What is the {l} word for {w}?",
)


def translation_answer(word: str, language: str) -> str:
    """Return the sentence with a word of another language."""
    translated = t.TRANSLATIONS[language][t.TRANSLATED_WORDS.index(word)]
    return f"{sentence(word)} in {language} is {translated}."


def ask_translation(rng: random.Random, state: State) -> Exchange:
    """Ask for one of a few words in another language."""
    word, language = rng.choice(t.TRANSLATED_WORDS), rng.choice(list(t.TRANSLATIONS))
    form = rng.choice(TRANSLATION_FORMS)
    user = form.format(w=word, W=sentence(word), l=language)
    return from_template(
        "translation",
        form,
        f"{word} {language}",
        user,
        translation_answer(word, language),
        topic="translation",
        word=word,
    )


def follow_translation(rng: random.Random, state: State) -> Exchange:
    """Ask for the same word in another language."""
    word, language = state["word"], rng.choice(list(t.TRANSLATIONS))
    form = rng.choice(("And in {l}?", "And {l}?", "What about {l}?", "In {l}?"))
    content = f"translation {word} {language}"
    return from_template(
        "follow_up_fact",
        form,
        content,
        form.format(l=language),
        translation_answer(word, language),
        topic="translation",
        word=word,
    )


def ask_to_name(rng: random.Random, state: State) -> Exchange:
    """Ask to name one to three things of a kind."""
    kind, count = rng.choice(list(t.NAMED)), rng.choice((1, 2, 3))
    phrase = a(kind) if count == 1 else f"{('two', 'three')[count - 2]} {plural(kind)}"
    form = rng.choice(
        (
            "Name {x}.",
            "Tell me {x}.",
            "Can you name {x}?",
            "Say {x}.",
            "Give me {x}.",
            "Do you know {x}?",
        )
    )
    names = t.NAMED[kind][:count]
    answer = {1: "{0}.", 2: "{0} and {1}.", 3: "{0}, {1} and {2}."}[count].format(*names)
    return from_template(
        "naming", form, f"{count} {kind}", form.format(x=phrase), answer, topic="naming"
    )


ECHO_FORMS = (
    "Say {x}.",
    "Repeat after me: {x}",
    "Repeat: {x}",
    "Please say {x}.",
    "Can you say {x}?",
    "Echo: {x}",
)


def ask_echo(rng: random.Random, state: State) -> Exchange:
    """Ask to repeat some words; trains copying in general."""
    pool = (*t.FOODS, *t.HOBBIES, *t.COLOURS, *t.PETS, *t.OPPOSITE_OF)
    words = " ".join(
        rng.choice(pool) if rng.random() < 0.6 else invented_word(rng)
        for _ in range(rng.randint(1, 4))
    )
    return Exchange(
        "echo",
        rng.choice(ECHO_FORMS).format(x=words),
        sentence(words) + ".",
        (f"echo:{words}",),
        {"topic": "echo"},
    )
