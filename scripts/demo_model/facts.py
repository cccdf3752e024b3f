"""Facts of the data files: colours, opposites, animals, capitals, languages, naming, repeating."""

from __future__ import annotations

import dataclasses

from .talk import Exchange, Talk, a, sentence

ANIMAL = ("sound", "legs", "home", "baby", "food")


def coloured_thing(talk: Talk) -> tuple[str, str, str]:
    """Return a thing as asked for, its colour and the answer."""
    if talk.chance(0.4):
        thing, colour = talk.pick_pair("colour.of")
        return thing, colour, f"{sentence(thing)} is {colour}."
    noun, colour = talk.pick_pair("colour.of_a")
    if talk.chance(0.35):
        return talk.plural(noun), colour, f"{sentence(talk.plural(noun))} are {colour}."
    return a(noun), colour, f"{sentence(a(noun))} is {colour}."


def capitalised(exchange: Exchange) -> Exchange:
    """Begin the question with a capital: things of the colour tables may come first."""
    return dataclasses.replace(exchange, user=sentence(exchange.user))


def ask_colour(talk: Talk) -> Exchange:
    """Ask for the colour of a thing, whether a thing has a colour, or for a thing of a colour."""
    roll = talk.rng.random()
    if roll < 0.08:
        colour, form = talk.pick("colours"), talk.pick("colour.ask_thing")
        answer = f"{sentence(talk.say(f'colour.something.{colour}'))} is {colour}."
        return talk.fact("colour", form, colour, answer, x=colour)
    thing, colour, answer = coloured_thing(talk)
    is_plural = " are " in answer
    if roll < 0.33:
        other = talk.pick("colours")
        asked = talk.rng.choice((colour, other))
        form = talk.data.text("colour.are" if is_plural else "colour.is")
        answer = f"{answer[:-1]}, so {'yes' if asked == colour else 'no'}."
        return talk.fact("colour", form, f"{thing},{asked}", answer, x=thing, c=asked)
    if roll < 0.41 and not is_plural:
        return ask_unknown_colour(talk)
    singular = ("colour.ask", "colour.ask_briefly")
    form = talk.pick("colour.ask_plural") if is_plural else talk.pick(*singular)
    bare = talk.chance(0.1) and thing.startswith(("a ", "an ", "the "))
    spoken = thing.split(" ", 1)[1] if bare else thing
    return capitalised(talk.fact("colour", form, thing, answer, x=spoken))


def ask_unknown_colour(talk: Talk) -> Exchange:
    """Ask for the colour of a thing that does not exist, or of one's own thing."""
    if talk.chance(0.5):
        whose, thing = talk.rng.choice(("my", "my", "the")), talk.pick("colour.my_things")
        form, asked = talk.pick("colour.ask"), f"{whose} {thing}"
        answer = talk.say("colour.unknown", x=f"{whose.replace('my', 'your')} {thing}")
        return talk.fact("colour", form, asked, answer, x=asked)
    word = talk.invented_word()
    thing = talk.rng.choice((a(word), a(word), f"the {word}"))
    form, answer = (
        talk.pick("colour.ask", "colour.ask_briefly"),
        talk.say("colour.unknown", x=thing),
    )
    return capitalised(talk.fact("colour", form, thing, answer, x=thing))


def follow_colour(talk: Talk) -> Exchange:
    thing, _, answer = coloured_thing(talk)
    return capitalised(talk.follow("colour", talk.pick("colour.next"), thing, answer, x=thing))


def ask_opposite(talk: Talk) -> Exchange:
    word, opposite = talk.rng.choice(list(talk.opposites().items()))
    form, answer = talk.pick("opposite.ask"), talk.say("opposite.answer", x=word, y=opposite)
    if talk.chance(0.12):
        word = talk.invented_word()
        answer = talk.say("opposite.unknown", x=word)
    return talk.fact("opposite", form, word, answer, x=word)


def follow_opposite(talk: Talk) -> Exchange:
    word, opposite = talk.rng.choice(list(talk.opposites().items()))
    answer = talk.say("opposite.answer", x=word, y=opposite)
    return talk.follow("opposite", talk.pick("opposite.next"), word, answer, x=word)


def ask_capital(talk: Talk) -> Exchange:
    form = talk.pick("capital.ask")
    if talk.chance(0.1):
        country = talk.invented_word().capitalize()
        answer = talk.say("capital.unknown", x=country)
    else:
        country, city = talk.pick_pair("capital.of")
        answer = talk.say("capital.answer", x=country, y=city)
    return talk.fact("capital", form, country, answer, x=country)


def follow_capital(talk: Talk) -> Exchange:
    country, city = talk.pick_pair("capital.of")
    answer = talk.say("capital.answer", x=country, y=city)
    return talk.follow("capital", talk.pick("capital.next"), country, answer, x=country)


def animal_answer(talk: Talk, name: str, kind: str) -> str:
    """Return the sentence with one fact about an animal."""
    known = talk.data.row(f"animal.known.{name}", ANIMAL)
    key = "animal.quiet" if kind == "sound" and not known["sound"] else f"animal.answer.{kind}"
    return talk.say(key, A=sentence(a(name)), n=name, a_baby=a(known["baby"]), **known)


def ask_animal(talk: Talk) -> Exchange:
    """Ask for a fact about an animal, which animal makes a sound, or about no animal at all."""
    roll = talk.rng.random()
    if roll < 0.06:
        name = talk.invented_word()
        keys = [f"animal.ask.{kind}" for kind in ("sound", "legs", "home", "food")]
        forms = [form for key in keys for form in talk.data.phrases(key) if "{ns}" not in form]
        form, answer = talk.rng.choice(forms), talk.say("animal.unknown", a=a(name))
        return talk.fact("animal", form, name, answer, {"topic": "unknown"}, a=a(name), n=name)
    name = talk.rng.choice(talk.data.names("animal.known"))
    sound = talk.data.row(f"animal.known.{name}", ANIMAL)["sound"]
    if roll < 0.14 and sound:
        kind, form = "sound", talk.pick("animal.by_sound")
    else:
        kind = talk.rng.choice(("sound", "sound", "legs", "home", "baby", "food", "kind"))
        form = talk.pick(f"animal.ask.{kind}")
    words = {"a": a(name), "n": name, "ns": talk.plural(name), "x": sound}
    return talk.fact("animal", form, name, animal_answer(talk, name, kind), {"fact": kind}, **words)


def follow_animal(talk: Talk) -> Exchange:
    name, kind = talk.rng.choice(talk.data.names("animal.known")), talk.state["fact"]
    form, answer = talk.pick("animal.next"), animal_answer(talk, name, kind)
    return talk.follow("animal", form, name, answer, about=kind, a=a(name), n=name)


def translate(talk: Talk, word: str, language: str) -> str:
    """Return the sentence with a word of another language."""
    row = talk.data.row(f"translation.into.{language}", talk.data.phrases("translation.words"))
    return talk.say("translation.answer", W=sentence(word), l=language, y=row[word])


def ask_translation(talk: Talk) -> Exchange:
    word = talk.pick("translation.words")
    language = talk.rng.choice(talk.data.names("translation.into"))
    form, answer = talk.pick("translation.ask"), translate(talk, word, language)
    words = {"w": word, "W": sentence(word), "l": language}
    content, remember = f"{word} {language}", {"word": word}
    return talk.fact("translation", form, content, answer, remember, **words)


def follow_translation(talk: Talk) -> Exchange:
    word, language = talk.state["word"], talk.rng.choice(talk.data.names("translation.into"))
    form, answer = talk.pick("translation.next"), translate(talk, word, language)
    return talk.follow("translation", form, f"{word} {language}", answer, l=language)


def ask_naming(talk: Talk) -> Exchange:
    """Ask to name one to three things of a kind."""
    kind, count = talk.rng.choice(talk.data.names("naming.first")), talk.rng.choice((1, 2, 3))
    phrase = a(kind) if count == 1 else f"{('two', 'three')[count - 2]} {talk.plural(kind)}"
    form, names = talk.pick("naming.ask"), talk.data.phrases(f"naming.first.{kind}")
    answer = ("{0}.", "{0} and {1}.", "{0}, {1} and {2}.")[count - 1].format(*names)
    return talk.fact("naming", form, f"{count} {kind}", answer, x=phrase)


def ask_echo(talk: Talk) -> Exchange:
    """Ask to repeat some words; trains copying in general."""
    pool = [*talk.data.join("foods", "hobbies", "colours", "pets"), *talk.opposites()]
    words = " ".join(
        talk.rng.choice(pool) if talk.chance(0.6) else talk.invented_word()
        for _ in range(talk.rng.randint(1, 4))
    )
    user = talk.fill(talk.pick("echo.ask"), x=words)
    return Exchange("echo", user, f"{sentence(words)}.", (f"echo:{words}",), {"topic": "echo"})
