"""What users tell about themselves, and the later questions about it."""

from __future__ import annotations

from .arithmetic import ask_addition, ask_subtraction
from .facts import ask_capital, ask_colour, ask_opposite
from .small_talk import ask_about
from .talk import Exchange, Talk, a, decapitalise, sentence


def tell_name(talk: Talk) -> Exchange:
    name = talk.any_name()
    user = talk.fill(talk.pick("name.introduce", "name.insist"), x=name)
    remember = {"name": name, "topic": "name"}
    return Exchange("name", user, talk.say("name.reply", x=name), (f"name:{name}",), remember)


def ask_name(talk: Talk) -> Exchange:
    """Ask for the name told before, if one was."""
    name, question = talk.state.get("name"), talk.pick("name.ask")
    if name is None:
        user, tag = talk.decorate(question)
        keys = (f"noname:{user}",) if tag else ()
        return Exchange("recall_untold", user, talk.say("name.untold"), keys)
    user, _ = talk.decorate(question, chance=0.05)
    return Exchange("recall", user, talk.say("name.answer", x=name), (f"name:{name}",))


def draw_fact(talk: Talk, invent_cities: bool) -> Exchange:
    """Tell an age, a favourite colour, a liking or a home."""
    kind = talk.rng.choice(talk.data.names("personal"))
    value = talk.pick(*talk.data.phrases(f"personal.{kind}.values"))
    if invent_cities and kind == "city" and talk.chance(0.3):
        value = talk.invented_word().capitalize()
    form = talk.pick(f"personal.{kind}.tell")
    user, keys = talk.fill(form, x=value), (f"{kind}:{form}|{value}",)
    reply = talk.say(f"personal.{kind}.reply", x=value, X=sentence(value))
    return Exchange("personal", user, reply, keys, {kind: value})


def tell_personal(talk: Talk) -> Exchange:
    exchange = draw_fact(talk, invent_cities=True)
    exchange.remember["topic"] = "personal"
    return exchange


def ask_personal(talk: Talk) -> Exchange:
    """Ask for something the user told about themselves, or did not."""
    kinds = talk.data.names("personal")
    told = [kind for kind in kinds if kind in talk.state]
    if not told or talk.chance(0.1):
        told = [kind for kind in kinds if kind not in talk.state] or kinds
    kind = talk.rng.choice(told)
    question = talk.pick(f"personal.{kind}.ask")
    user, tag = talk.decorate(question, chance=0.1)
    if kind not in talk.state:
        keys = (f"untold:{question}|{tag}",) if tag else ()
        return Exchange("recall_untold", user, talk.say(f"personal.{kind}.untold"), keys)
    value = talk.state[kind]
    answer = talk.say(f"personal.{kind}.answer", x=value)
    return Exchange("recall", user, answer, (f"recall:{question}|{value}",))


def two_pets(talk: Talk) -> Exchange:
    """Tell the names of two pets in one sentence."""
    first, second = talk.rng.sample(talk.data.phrases("pets"), 2)
    name, other = talk.any_name(), talk.any_name()
    verb = talk.rng.choice(("named", "called"))
    user = f"I have {a(first)} {verb} {name} and {a(second)} {verb} {other}."
    if talk.chance(0.3):
        user = f"My {first} is called {name} and my {second} is called {other}."
    pets = {**talk.state.get("pets", {}), first: name, second: other}
    reply, keys = talk.say("pet.reply_two", x=name, y=other), (f"name:{name}", f"name:{other}")
    return Exchange("personal", user, reply, keys, {"pets": pets, "topic": "pet"})


def tell_pet(talk: Talk) -> Exchange:
    """Tell the name of a pet, or of two."""
    if talk.chance(0.2):
        return two_pets(talk)
    pet, name = talk.pick("pets"), talk.any_name()
    user = talk.fill(talk.pick("pet.tell"), pet=pet, x=name)
    remember = {"pets": {**talk.state.get("pets", {}), pet: name}, "topic": "pet"}
    reply = talk.say("pet.reply", pet=pet, x=name)
    return Exchange("personal", user, reply, (f"name:{name}",), remember)


def ask_pet(talk: Talk) -> Exchange:
    """Ask for the name of a pet told before, or of one never mentioned.

    Both answers begin with the pet: the model looks it up while it writes, not before.
    """
    pets: dict[str, str] = talk.state.get("pets", {})
    unknown = [pet for pet in talk.data.phrases("pets") if pet not in pets]
    if not pets or (unknown and talk.chance(0.33)):
        pet = talk.rng.choice(unknown)
        user = talk.fill(talk.pick("pet.ask"), pet=pet)
        return Exchange("recall_untold", user, talk.say("pet.untold", pet=pet), (f"untold:{user}",))
    pet = talk.rng.choice(sorted(pets))
    user, name = talk.fill(talk.pick("pet.ask"), pet=pet), pets[pet]
    answer = talk.say("pet.answer", pet=pet, x=name)
    return Exchange("recall", user, answer, (f"name:{name}",))


follow_pet = ask_pet


def tell_introduction(talk: Talk) -> Exchange:
    """Say one's name and something more in one message."""
    name = talk.any_name()
    opening = talk.fill(talk.pick("name.introduce"), x=name)
    if talk.chance(0.5):
        then = draw_fact(talk, invent_cities=False)
        more = then.user
        if talk.chance(0.5) and more.startswith(("I ", "I'm", "My")):
            more = f"and {decapitalise(more)}"
    else:
        askers = (ask_about, ask_addition, ask_subtraction, ask_colour, ask_capital, ask_opposite)
        then = talk.rng.choice(askers)(Talk(talk.data, talk.rng))
        more = then.user
    if more.startswith("and "):
        opening = opening.rstrip(".")
    elif opening.endswith(".") and talk.chance(0.2):
        opening, more = opening[:-1], decapitalise(more)
    answer = f"{talk.say('name.reply', x=name)} {then.assistant}"
    keys, remember = (f"name:{name}", *then.keys), {"topic": "name", **then.remember, "name": name}
    return Exchange("introduction", f"{opening} {more}", answer, keys, remember)


def ask_recall(talk: Talk) -> Exchange:
    """Ask for something from the earlier turns, mostly for something that was told."""
    told = {
        ask_name: 2 * ("name" in talk.state),
        ask_pet: 2 * ("pets" in talk.state),
        ask_personal: any(kind in talk.state for kind in talk.data.names("personal")),
    }
    known = [asker for asker, weight in told.items() for _ in range(weight)]
    choices = known if known and talk.chance(0.85) else (ask_name, ask_personal, ask_pet)
    return talk.rng.choice(choices)(talk)
