"""Greetings, questions about the model itself, jokes, and everything it does not know."""

from __future__ import annotations

import dataclasses

from .stories import story
from .talk import Asker, Exchange, Talk, sentence


def small_talk(category: str) -> Asker:
    """Make the asker for one category of small talk.

    The bare phrasings are all trained (they are few, and they are what people type); what is held
    out are combinations of a phrasing with the words around it.
    """

    def ask(talk: Talk) -> Exchange:
        reply = talk.rng.choice(talk.data.replies(category))
        return talk.fixed(category, reply.phrase, reply.answer, reply.topic or category, 0.3)

    return ask


ask_greeting, ask_about, ask_joke = map(small_talk, ("greeting", "about", "joke"))


def follow_how_are_you(talk: Talk) -> Exchange:
    """Answer "How are you?"."""
    mood, reply, topic = ("well", "glad", "") if talk.chance(0.65) else ("badly", "sorry", "offer")
    phrase, answer = talk.pick(f"how_are_you.{mood}"), talk.say(f"how_are_you.{reply}")
    return talk.fixed("greeting", phrase, answer, topic)


def follow_offer(talk: Talk) -> Exchange:
    """Accept or decline the story offered."""
    if talk.chance(0.3):
        return talk.fixed("greeting", talk.pick("offer.decline"), talk.say("offer.declined"))
    accepted = talk.fixed("greeting", talk.pick("offer.accept"), "")
    told = story(talk, accepted.user, talk.data.names("story.plots")[0], accepted.keys)
    return dataclasses.replace(told, category="greeting")


def follow_joke(talk: Talk) -> Exchange:
    return talk.fixed("joke", talk.pick("joke_again.ask"), talk.say("joke_again.answer"))


def ask_liking(talk: Talk) -> Exchange:
    """Ask whether the model likes something."""
    thing, form = talk.pick("foods", "hobbies"), talk.pick("liking.ask")
    user, answer = talk.fill(form, x=thing), talk.say("liking.answer", x=thing)
    return Exchange("about", user, answer, (f"liking:{form}|{thing}",), {"topic": "about"})


def unknown(talk: Talk, user: str, *keys: str) -> Exchange:
    """Give the one answer to everything outside the small world."""
    return Exchange("out_of_domain", user, talk.say("unknown.answer"), keys, {"topic": "unknown"})


def ask_fragment(talk: Talk) -> Exchange:
    """Type something that is no question: a lone number or word, a sum without its end."""
    kind = talk.rng.choice(("number", "sum", "word", "word"))
    if kind == "number":
        user = str(talk.rng.randint(0, 999))
    elif kind == "sum":
        user = talk.fill(talk.pick("unknown.fragments"), n=talk.rng.randint(0, 99))
    else:
        known = [*talk.data.join("foods", "hobbies", "colours"), *talk.opposites()]
        user = sentence(talk.rng.choice([*known, talk.invented_word()]))
    return unknown(talk, user, f"fragment:{user}")


def ask_unknown(talk: Talk) -> Exchange:
    """Ask for something outside the small world."""
    if talk.chance(0.15) and "topic" not in talk.state:
        return ask_fragment(talk)
    if talk.chance(0.3):
        task = talk.pick("unknown.tasks")
        user, tag = talk.decorate(task)
        return unknown(talk, user, *([f"far:{task}|{tag}"] if tag else []))
    noun = talk.pick("unknown.nouns") if talk.chance(0.6) else talk.invented_word()
    question = talk.pick("unknown.questions")
    return unknown(talk, talk.fill(question, x=noun), f"far:{question}|{noun}")
